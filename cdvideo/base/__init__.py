"""The base model: loading, text with spliced concept tokens, latents and noise schedules (no torch at import)."""
