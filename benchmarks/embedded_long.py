"""Streaming long tuning on the embedded world, judged on the last window of streams five times a clip's length, and the
usual tuning on first windows beside it, as one recorded table.

    python -m benchmarks.embedded_long --output_dir runs/long-table
"""

from benchmarks.experiment import run_experiment

ARMS = {
    "long tuning, windows anywhere": "embedded/astrolabe_long.gin",
    "short tuning, first windows": "embedded/nft_judged_late.gin",
}


if __name__ == "__main__":
    run_experiment(__doc__, ARMS)
