"""Teaching the image model one thing: adapters, losses, the training loop, and the concept file."""
