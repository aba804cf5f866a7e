"""What a model is made of: its shape, read from a configuration; the catalog of known ones."""
