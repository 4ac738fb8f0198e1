"""Training objectives of diffusion models: config, corruption, loss weights and losses. Uses models; reads no files."""
