"""HookedVLM and what belongs to it: cache, generation, weights in TransformerLens' shapes, its hook points and memory."""
