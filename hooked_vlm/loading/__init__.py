"""Checkpoint folders, the hub and transformers' models: how a model is filled, where its weights lie, how it is saved."""
