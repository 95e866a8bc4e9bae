"""How a batch becomes the denoiser's inputs, for every pipeline of diffusers."""
