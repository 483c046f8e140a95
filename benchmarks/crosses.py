"""Parts of different papers in one recipe, on the embedded world, as one recorded table. The routed arms stream 42
frames and are judged on those, CM-GRPO on its 21, so a gain is to be read against its own start.

    python -m benchmarks.crosses --output_dir runs/crosses-table
"""

from benchmarks.experiment import run_experiment

ARMS = {
    "routing + NFT": "crosses/routing_nft.gin",
    "routing + Gaussian ratio": "crosses/routing_gaussian_ratio.gin",
    "noise + Gaussian + selective KL": "crosses/noise_gaussian_selective.gin",
    "routing + Gibbs + anchor KL + selective KL": "crosses/gibbs_anchor_selective.gin",
}


if __name__ == "__main__":
    run_experiment(__doc__, ARMS)
