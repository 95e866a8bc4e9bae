"""Keys and values of cross-attention computed once per text."""
