"""Mix-of-Show (Gu et al., NeurIPS 2023): ED-LoRA, gradient fusion, regionally controllable sampling."""
