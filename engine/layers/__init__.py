"""Building blocks of the decoder: linear (swappable weights), norm, rotary, attention interface."""
