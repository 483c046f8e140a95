"""The recorded distillation table in miniature: every arm runs, finished runs are kept, cut ones resumed."""

from pathlib import Path

import pytest

from benchmarks import embedded_distill
from framework.config.load import load_config

SMALL = (
    "distill.max_steps = 2",
    "distill.batch_size = 1",
    "distill.critic_warmup = 0",
    "evaluation.HeldOut.members = 1",
    "held_out/scenes.ShapesCaptions.limit = 2",
)


def test_the_table_is_written_and_finished_runs_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output_dir", str(tmp_path), "--arms", "clean history"]
    for line in SMALL:
        arguments += ["--gin_param", line]
    embedded_distill.main(arguments)
    first = (tmp_path / "4-0" / "metrics.jsonl").stat().st_mtime_ns
    embedded_distill.main(arguments)
    assert (tmp_path / "4-0" / "metrics.jsonl").stat().st_mtime_ns == first
    header, _, packaged, base, row = (tmp_path / "table.md").read_text().splitlines()[:5]
    assert "against the packaged" in header and "+0.000 [+0.000, +0.000]" in packaged
    assert base.startswith("| base, the start |") and row.startswith("| clean history | 0 | 2 |")
    assert "ceiling" in capsys.readouterr().out


def test_an_unfinished_run_goes_on_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    result = type("Done", (), {"returncode": 0})
    monkeypatch.setattr(embedded_distill.subprocess, "run", lambda command, **_: (seen.append(command), result)[1])
    run = embedded_distill.Run("default", 0, tmp_path / "0-0")
    for _ in range(2):
        embedded_distill.launch(run, [])
    assert seen[0] == seen[1] and "--resume" not in seen[0], "auto is the default"


@pytest.mark.parametrize("arm", embedded_distill.ARMS)
def test_every_arm_is_a_configuration_that_differs_from_the_default(arm: str) -> None:
    default, changed = (
        load_config("distill", gin_files=["embedded/distill.gin"], gin_params=lines).operative_config()
        for lines in ((), embedded_distill.ARMS[arm])
    )
    assert (default == changed) == (arm == "default")
