"""Attention to several regions of text at once."""
