"""Many identities in one batch: every sample with its own expert, out of a pool on the device."""
