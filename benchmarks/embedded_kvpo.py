"""The KVPO experiment on the embedded world, on streams of 42 frames, as one recorded table: routing at all steps with
adapters and with every weight trained, routing as the paper has it, an attempt to let that work, and rewards shuffled
inside groups.

    python -m benchmarks.embedded_kvpo --output_dir runs/kvpo-table
"""

from benchmarks.experiment import run_experiment

ARMS = {
    "KVPO, LoRA": "embedded/kvpo.gin",
    "KVPO, full fine-tuning": "embedded/kvpo_full.gin",
    "KVPO, LoRA, routed in the first half": "embedded/kvpo_paper_steps.gin",
    "first half and clean write, one recent frame": "embedded/kvpo_first_half.gin",
    "rewards shuffled inside groups": "embedded/kvpo_shuffled.gin",
    "first half and clean write, rewards shuffled": "embedded/kvpo_first_half_shuffled.gin",
}


if __name__ == "__main__":
    run_experiment(__doc__, ARMS)
