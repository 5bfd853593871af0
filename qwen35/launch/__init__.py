"""The processes of a run on this machine, and its ties to the other machines. Knows no model; a rank runs qwen35.train."""
