"""The Plan page and its widgets."""
