"""Parts of different papers in one recipe: each cross is a short file, is what it says, and takes a training step."""

from typing import Any

import pytest

from benchmarks import crosses
from framework.cli import main
from framework.config.load import load_config, packaged_configs, packaged_folder
from framework.interfaces import ExplorationStrategy, SurrogatePolicy
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.anchor_velocity import AnchorVelocityKL
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.selective_kl import SelectiveKL
from strategies.regularizers.several import Several
from strategies.surrogates.gaussian_kernel import GaussianRatio, GaussianReinforce
from strategies.surrogates.gibbs_tve import GibbsTVE
from strategies.surrogates.nft import NFT

SHARED = "crosses/selective.gin"
CROSSES: dict[str, tuple[type[ExplorationStrategy], type[SurrogatePolicy], list[type]]] = {
    "crosses/routing_nft.gin": (CausalHistoryRouting, NFT, [NoRegularizer]),
    "crosses/routing_gaussian_ratio.gin": (CausalHistoryRouting, GaussianRatio, [NoRegularizer]),
    "crosses/noise_gaussian_selective.gin": (NoiseEndpoint, GaussianReinforce, [SelectiveKL]),
    "crosses/gibbs_anchor.gin": (CausalHistoryRouting, GibbsTVE, [AnchorVelocityKL]),
    "crosses/gibbs_anchor_selective.gin": (CausalHistoryRouting, GibbsTVE, [AnchorVelocityKL, SelectiveKL]),
}
SMALL = (
    "noise_endpoint.NoiseEndpoint.group_size = 4",
    "noise_endpoint.NoiseEndpoint.window_blocks = 2",
    "causal_history_routing.CausalHistoryRouting.group_size = 3",
    "causal_history_routing.CausalHistoryRouting.stream_blocks = 9",
    "train.prompts_per_step = 2",
)


def parts(config: str) -> dict[str, Any]:
    return load_config("train", gin_files=[config]).build()


def flags(config: str) -> list[str]:
    """The small settings of the parts that a cross has."""
    used = load_config("train", gin_files=[config]).operative_config()
    return [word for line in SMALL if line.split(".")[0] in used for word in ("--gin_param", line)]


def test_every_packaged_cross_is_tested_here():
    assert {config for config in packaged_configs() if config.startswith("crosses/")} == {*CROSSES, SHARED}


def test_the_arms_of_the_recorded_table_are_crosses_of_their_own():
    configs = list(crosses.ARMS.values())
    assert set(configs) <= set(CROSSES) and len(set(configs)) == len(configs) == 4


@pytest.mark.parametrize("config", [*CROSSES, SHARED])
def test_a_cross_is_a_comment_and_a_handful_of_lines(config: str):
    lines = (packaged_folder() / config).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 6 and lines[0].startswith("# ") and (config == SHARED or lines[1].startswith("include '"))


@pytest.mark.parametrize("config", CROSSES)
def test_a_cross_has_the_parts_that_its_name_says(config: str):
    exploration, surrogate, regularizers = CROSSES[config]
    found = parts(config)
    assert type(found["exploration"]) is exploration and type(found["surrogate"]) is surrogate
    regularizer = found["regularizer"]
    assert [type(part) for part in (regularizer.parts if isinstance(regularizer, Several) else [regularizer])] == (
        regularizers
    )


@pytest.mark.parametrize(
    ("config", "base", "changed"),
    [
        ("crosses/routing_nft.gin", "embedded/kvpo.gin", {"surrogate"}),
        ("crosses/routing_gaussian_ratio.gin", "embedded/kvpo.gin", {"surrogate"}),
        ("crosses/noise_gaussian_selective.gin", "embedded/raven_cm_grpo.gin", {"regularizer"}),
        ("crosses/gibbs_anchor_selective.gin", "embedded/kvpo.gin", {"regularizer"}),
    ],
)
def test_a_cross_differs_from_its_base_in_one_part(config: str, base: str, changed: set[str]):
    one, two = parts(base), parts(config)
    plain = ("exploration", "surrogate", "reward", "advantage", "regularizer", "optimizer", "scenes", "max_steps",
             "prompts_per_step", "updates_per_rollout", "behaviour_decay")  # fmt: skip
    assert {name for name in plain if one.get(name) != two.get(name)} == changed


@pytest.mark.parametrize("config", CROSSES)
def test_a_cross_takes_a_training_step(config: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--gin_file", config, "--dry_run", *flags(config)]) == 0
    assert "one step done, nothing written" in capsys.readouterr().out


def test_a_cross_of_parts_that_do_not_fit_is_refused_with_one_sentence(capsys: pytest.CaptureFixture[str]):
    wrong = ["--gin_param", "REGULARIZER = @branch_kl.BranchKL()"]
    assert main(["train", "--gin_file", "crosses/routing_nft.gin", "--dry_run", *wrong]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "BranchKL reads BranchLogits" in said and "NFT writes only EndpointShift" in said
