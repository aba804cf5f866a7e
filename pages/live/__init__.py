"""The Live page and its widgets."""
