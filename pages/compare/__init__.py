"""The Compare page and its widgets."""
