"""Checkpoint folders, the hub and transformers' models: how a model is filled, placed on devices and saved."""
