"""The NFT experiment on the embedded world: seeds × {LoRA, full fine-tuning, random reward}, as one recorded table.

python -m benchmarks.embedded_nft --output_dir runs/nft-table
"""

from benchmarks.experiment import run_experiment

ARMS = {
    "NFT, LoRA": "embedded/nft.gin",
    "NFT, full fine-tuning": "embedded/nft_full.gin",
    "random reward, LoRA": "embedded/nft_random.gin",
}


if __name__ == "__main__":
    run_experiment(__doc__, ARMS)
