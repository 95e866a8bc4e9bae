"""DiffLoRA (Wu et al., arXiv 2408.06740): a network that predicts a person's LoRA from pictures.

The paper has no public model code. What is known of it: 1-D convolutions that compress a LoRA nearly 300
times, a loss that preserves
large weights, a gate over face and image features, a DiT of 16 layers with AdaLN that predicts the clean
latent. What is this package's
own choice is called "ours" where it is made.
"""
