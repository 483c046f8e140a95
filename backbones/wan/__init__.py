"""The Wan 2.1 family: a causal transformer on diffusers, its checkpoints and its streaming generator."""
