"""Kernels, by the language they are written in; nothing here is imported until a backend asks for it."""
