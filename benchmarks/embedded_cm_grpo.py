"""The CM-GRPO experiment on the embedded world, with Flow-GRPO's kernel at the same budget, as one recorded table.

python -m benchmarks.embedded_cm_grpo --output_dir runs/cm-grpo-table
"""

from benchmarks.experiment import run_experiment

ARMS = {
    "CM-GRPO, LoRA": "embedded/raven_cm_grpo.gin",
    "CM-GRPO, full fine-tuning": "embedded/cm_grpo_full.gin",
    "Flow-GRPO kernel, LoRA": "embedded/flow_grpo.gin",
    "random reward, LoRA": "embedded/cm_grpo_random.gin",
}


if __name__ == "__main__":
    run_experiment(__doc__, ARMS)
