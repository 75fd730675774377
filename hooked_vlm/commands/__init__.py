"""Commands that tell about models: their sizes and memory, and their hook points."""
