"""Adapter families beside LoRA: what each adds to a layer, with the formula and the rule of its writer."""
