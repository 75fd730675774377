"""HookedVLM and what belongs to it: cache, generation, weights in TransformerLens' shapes, hook points, memory."""
