"""The identity encoder: whether two pictures of the world show the same individual."""
