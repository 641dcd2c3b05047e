"""The illustrated world that the embedded base learned from: drawings, scenes, captions, and the base's training."""
