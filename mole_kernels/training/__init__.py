"""Training: the denoising loss, one loop on accelerate, checkpoints that a kill does not break."""
