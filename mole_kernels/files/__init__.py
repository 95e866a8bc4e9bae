"""Safetensors in and out, without knowing what is in them."""
