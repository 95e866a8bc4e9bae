"""How the key names of other tools map to module paths, as tables."""
