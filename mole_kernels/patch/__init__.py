"""From plan to patched model and back."""
