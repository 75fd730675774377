"""What goes into a model: images, prompts, tokens, and the batch that carries them."""
