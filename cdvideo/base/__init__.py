"""The base model: loading, text encoding with spliced concept tokens, latents and noise schedules (no torch at import)."""
