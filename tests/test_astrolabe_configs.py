"""Astrolabe has the paper's numbers, its embedded recipe trains, and the laboratory's arms differ in one part."""

import pytest
import torch

from benchmarks import hacking_lab
from benchmarks.experiment import Run
from benchmarks.hacking_lab import Curve, Point, common_levels, compare, truth_at
from framework.advantages import PrimaryOnly
from framework.cli import main
from framework.config.load import load_config, packaged_configs
from framework.optimization import AdamW, Ramp
from framework.reference import Dynamic
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.selective_kl import AtRandom, OverRated, SelectiveKL, UnderRated
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.nft import NFT
from tests.support import close, normal
from tests.test_paper_configs import loaded

SMALL = (
    "train.max_steps = 1",
    "train.prompts_per_step = 1",
    "noise_endpoint.NoiseEndpoint.group_size = 4",
    "noise_endpoint.NoiseEndpoint.window_blocks = 2",
    "evaluation.HeldOut.members = 2",
    "held_out/scenes.ShapesCaptions.limit = 3",
)


def parts(config: str) -> dict:
    return load_config("train", gin_files=[config]).build()


def test_astrolabe_has_the_papers_numbers():
    found = loaded("papers/astrolabe.gin").build()
    assert found["surrogate"] == NFT(1.0, 5.0) and found["behaviour_decay"] == Ramp(0.001, 0.5)
    assert (found["exploration"].group_size, found["prompts_per_step"]) == (24, 48)
    assert found["optimizer"] == AdamW(1e-5, 0.9, 0.999, 1e-8, 1e-4, 1.0) and found["adaptation"].rank == 256
    regularizer = found["regularizer"]
    assert isinstance(regularizer, SelectiveKL) and isinstance(found["reference"], Dynamic)
    assert (regularizer.primary, regularizer.auxiliaries, regularizer.weight) == ("VQ", ("MQ", "TA"), 1e-4)
    assert found["reference"].max_age == 16


def test_the_embedded_recipe_has_its_regularizer_and_reference():
    found = parts("embedded/astrolabe.gin")
    assert isinstance(found["regularizer"], SelectiveKL) and isinstance(found["reference"], Dynamic)


ARMS = {
    "embedded/lab.gin": (NoRegularizer, None),
    "embedded/lab_uniform.gin": (VelocityKL, None),
    "embedded/lab_selective.gin": (SelectiveKL, OverRated),
    "embedded/lab_random.gin": (SelectiveKL, AtRandom),
    "embedded/lab_inverted.gin": (SelectiveKL, UnderRated),
}


@pytest.mark.parametrize("config", ARMS)
def test_the_arms_of_the_laboratory_differ_in_the_regularizer_alone(config: str):
    kind, selection = ARMS[config]
    base, found = parts("embedded/lab.gin"), parts(config)
    assert isinstance(found["regularizer"], kind) and found["advantage"] == PrimaryOnly("proxy", clip=2.5)
    if selection is not None:
        assert isinstance(found["regularizer"].selection, selection)
    same = ("surrogate", "exploration", "optimizer", "scenes", "max_steps", "prompts_per_step", "reward")
    assert all(found[name] == base[name] for name in same)


def test_the_modes_of_the_laboratory_are_packaged_configurations():
    configs = [hacking_lab.NONE, *(mode.config for mode in hacking_lab.MODES.values())]
    assert set(configs) == set(ARMS) and set(configs) <= set(packaged_configs())


# the comparison at equal proxy


def line(seed: int, slope: float, proxies: tuple[float, ...] = (0.8, 0.7, 0.5)) -> Curve:
    """Truth falls with the proxy, clip by clip, from the same start."""
    base = normal(seed, 5, 2)
    return [Point(float(i), proxy, base - slope * (proxy - 0.5)) for i, proxy in enumerate(proxies)]


def test_truth_is_linear_between_neighbouring_weights():
    curve = line(0, 2.0)
    for proxy in (0.8, 0.75, 0.7, 0.66, 0.5):
        close(truth_at(curve, proxy), normal(0, 5, 2) - 2 * (proxy - 0.5), atol=1e-12)
    with pytest.raises(ValueError, match="add weights to the grid"):
        truth_at(curve, 0.9)


def test_levels_lie_where_all_curves_reach():
    levels = common_levels([line(0, 1.0), line(1, 1.0, (0.9, 0.6))], 2)
    assert levels == pytest.approx([0.65, 0.75])
    with pytest.raises(ValueError, match="no proxy in common"):
        common_levels([line(0, 1.0), line(0, 1.0, (0.4, 0.3))], 2)


def test_a_mode_that_keeps_more_of_the_truth_is_ahead_by_that_much_and_the_baseline_by_nothing():
    curves = {"uniform": [line(0, 2.0), line(1, 2.0)], "selective": [line(0, 1.0), line(1, 1.0)]}
    rows = {row[1]: row for row in compare(curves, 0.7, resamples=200)}
    assert rows["selective"][3] == "+0.200 [+0.200, +0.200]" and rows["selective"][4] == "+0.200 +0.200"
    assert rows["uniform"][3] == "–"
    shifted = {name: [[Point(p.weight, p.proxy, p.truth + 1) for p in c] for c in seeds]
               for name, seeds in curves.items()}  # fmt: skip
    assert compare(shifted, 0.7, resamples=200)[1][3:] == rows["selective"][3:]


def here(run: Run, extra: list[str]) -> None:
    """Train in this process, which saves starting another."""
    arguments = ["--gin_file", run.config, "--seed", str(run.seed), "--output_dir", str(run.folder), *extra]
    assert main(["train", *arguments]) == 0


def test_the_laboratory_in_miniature_writes_its_table(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hacking_lab, "launch", here)
    arguments = ["--output_dir", str(tmp_path), "--seeds", "1", "--weights", "0.01", "--modes", "selective"]
    arguments += ["--parallel", "1"]
    hacking_lab.main([*arguments, *(word for text in SMALL for word in ("--gin_param", text))])
    table = (tmp_path / "table.md").read_text()
    assert "| no KL | 0 |" in table and "| uniform | 0.01 |" in table and "| selective | 0.04 |" in table
    assert "compared" in table and str(tmp_path / "table.md") in capsys.readouterr().out
    assert torch.isfinite(hacking_lab.read_point(tmp_path / "lab-0", 0.0).truth).all()


def test_the_embedded_recipe_takes_a_step(capsys: pytest.CaptureFixture[str]):
    flags = [word for text in SMALL for word in ("--gin_param", text)]
    assert main(["train", "--gin_file", "embedded/astrolabe.gin", "--dry_run", *flags]) == 0
    assert "one step done" in capsys.readouterr().out
