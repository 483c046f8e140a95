"""Streaming generators: a causal transformer, its KV history, and the ways to evaluate it."""
