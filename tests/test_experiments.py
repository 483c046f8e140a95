"""The recorded experiments still run: each command in miniature."""

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import embedded_cm_grpo, embedded_generator, embedded_kvpo, embedded_long, embedded_nft
from benchmarks.experiment import run_experiment
from framework.config.load import packaged_configs

SMALL = (
    "train.max_steps = 1",
    "train.prompts_per_step = 1",
    "evaluation.HeldOut.members = 1",
    "held_out/scenes.ShapesCaptions.limit = 2",
)


@pytest.mark.parametrize(
    ("experiment", "arm", "stem", "group"),
    [
        (embedded_nft, "NFT, LoRA", "nft", "noise_endpoint.NoiseEndpoint"),
        (embedded_kvpo, "KVPO, LoRA", "kvpo", "causal_history_routing.CausalHistoryRouting"),
    ],
)
def test_a_table_is_written_and_finished_runs_are_kept(
    experiment: ModuleType, arm: str, stem: str, group: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output_dir", str(tmp_path), "--seeds", "1", "--arms", arm]
    for line in (*SMALL, f"{group}.group_size = 2"):
        arguments += ["--gin_param", line]
    run_experiment(experiment.__doc__, experiment.ARMS, arguments)
    first = (tmp_path / f"{stem}-0" / "metrics.jsonl").stat().st_mtime_ns
    run_experiment(experiment.__doc__, experiment.ARMS, arguments)
    assert (tmp_path / f"{stem}-0" / "metrics.jsonl").stat().st_mtime_ns == first
    header, _, row = (tmp_path / "table.md").read_text().splitlines()[:3]
    assert "| VQ | MQ | TA |" in header and row.startswith(f"| {arm} | 0 |")
    assert "ceiling" in capsys.readouterr().out


@pytest.mark.parametrize("experiment", [embedded_nft, embedded_cm_grpo, embedded_kvpo, embedded_long])
def test_every_arm_is_a_packaged_configuration_of_its_own(experiment: ModuleType) -> None:
    configs = list(experiment.ARMS.values())
    assert set(configs) <= set(packaged_configs()) and len(set(configs)) == len(configs)


def test_the_generator_is_described_between_its_floors_and_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    embedded_generator.main(["--members", "2", "--captions", "2"])
    out = capsys.readouterr().out
    assert "ceiling" in out and "packed replay against streaming rollout" in out and "frames 42–62" in out
