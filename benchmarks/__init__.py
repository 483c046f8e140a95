"""Measures speed and memory: `python -m benchmarks` prints the whole table, `python -m benchmarks p2` one row."""
