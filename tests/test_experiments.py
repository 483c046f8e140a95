"""The recorded experiments still run: each command in miniature."""

from pathlib import Path

import pytest

from benchmarks import embedded_generator, embedded_nft

SMALL = (
    "train.max_steps = 1",
    "train.prompts_per_step = 1",
    "noise_endpoint.NoiseEndpoint.group_size = 2",
    "evaluation.HeldOut.members = 1",
    "held_out/scenes.ShapesCaptions.limit = 2",
)


def test_the_nft_table_is_written_and_finished_runs_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output_dir", str(tmp_path), "--seeds", "1", "--arms", "NFT, LoRA"]
    for line in SMALL:
        arguments += ["--gin_param", line]
    embedded_nft.main(arguments)
    first = (tmp_path / "nft-0" / "metrics.jsonl").stat().st_mtime_ns
    embedded_nft.main(arguments)
    assert (tmp_path / "nft-0" / "metrics.jsonl").stat().st_mtime_ns == first
    header, _, row = (tmp_path / "table.md").read_text().splitlines()[:3]
    assert "| VQ | MQ | TA |" in header and row.startswith("| NFT, LoRA | 0 |")
    assert "ceiling" in capsys.readouterr().out


def test_the_generator_is_described_between_its_floors_and_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    embedded_generator.main(["--members", "2", "--captions", "2"])
    out = capsys.readouterr().out
    assert "ceiling" in out and "packed replay against streaming rollout" in out and "frames 42–62" in out
