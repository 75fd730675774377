"""What is run on the repository and not shipped: pages of the docs, training of the toy models."""
