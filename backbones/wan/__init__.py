"""The Wan 2.1 family: a causal transformer on diffusers, and the key map of its checkpoints."""
