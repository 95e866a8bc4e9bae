"""PEFT layers computed by the package's operator."""
