"""Sampling: prompts compiled to K and V, guidance, the denoising loop, pictures and films (no torch at import)."""
