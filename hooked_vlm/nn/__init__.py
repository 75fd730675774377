"""The modules of both towers: attention, norms, blocks, rotary embeddings, masks, key-value cache, hook points."""
