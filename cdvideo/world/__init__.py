"""The illustrated world that the embedded base learned from: its drawings, scenes and captions, and the base's training."""
