"""A trained model answers: loaded, asked, scored. Nothing here trains."""
