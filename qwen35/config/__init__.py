"""Settings: each with its default (schema), from a recipe to objects (load), the rules between them. Knows no model."""
