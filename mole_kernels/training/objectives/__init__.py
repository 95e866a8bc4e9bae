"""What a denoiser is taught: how a latent is noised, what is predicted of it, and how errors are weighed."""
