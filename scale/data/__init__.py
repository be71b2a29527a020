"""From files to batches: reading, caching, latents and the autoencoder."""
