"""The History page and its widgets."""
