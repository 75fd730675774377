"""Toy vision-language models that read: data, tokenizer, training and evaluation."""
