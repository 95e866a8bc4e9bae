"""Layers that share one input computed as one product."""
