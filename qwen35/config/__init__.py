"""Settings: definitions (schema), recipes to objects (load), rules. Knows no model and no torch."""
