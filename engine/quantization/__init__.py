"""Weight formats and the algorithms that make them."""
