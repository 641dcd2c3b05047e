"""Pictures and clips in, frames out. Knows files, knows no model."""
