"""Wan (arXiv 2503.20314): a causal 3-D autoencoder, UMT5 as text encoder, and a diffusion transformer over clips."""
