"""The judge: what is in a picture of the world."""
