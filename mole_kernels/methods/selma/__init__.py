"""SELMA (Li et al., NeurIPS 2024): prompts by skill, pictures by the model itself, an expert per skill, all
merged with weights 1/T.
"""
