"""The illustrated world that the embedded base learned from: sprites, individuals, scenes, captions, and the base's training."""
