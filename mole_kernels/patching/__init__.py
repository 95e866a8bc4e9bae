"""From plan to patched model and back, and PEFT layers accelerated."""
