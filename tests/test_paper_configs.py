"""The papers' recipes hold the papers' numbers, and run: on the embedded generator, with a handful of clips."""

from pathlib import Path
from typing import Any

import pytest

from backbones.embedded.generator import embedded_recipe
from framework.anchored_advantages import AnchorRelative
from framework.block_weights import FutureParticipation
from framework.cli import main
from framework.config.load import Configuration, load_config, packaged_configs, packaged_folder
from framework.kernels import FlowGRPO
from framework.optimization import AdamW
from framework.raven_advantages import RavenAdvantage
from strategies.regularizers.branch_kl import BranchKL
from strategies.regularizers.kernel_kl import KernelKL
from strategies.surrogates.gaussian_kernel import GaussianRatio, GaussianRegression
from strategies.surrogates.transitions import AllSteps, OneRandomStep, PlainSteps

EMBEDDED = (
    "GENERATOR = @embedded.packaged_generator()",
    "REWARD = @shapes.ShapesReward()",
    "JUDGE = @shapes.ShapesReward()",
    "SCENES = @scenes.ShapesCaptions()",
    "HELD_OUT = @held_out/scenes.ShapesCaptions()",
    "held_out/scenes.ShapesCaptions.held_out = True",
    "train.threads = 1",
)
"""What the recipes require, in the embedded world."""
SMALL = (
    "noise_endpoint.NoiseEndpoint.group_size = 2",
    "noise_endpoint.NoiseEndpoint.window_blocks = 2",
    "adapters.LoRA.rank = 4",
    "causal_history_routing.CausalHistoryRouting.group_size = 2",
    "causal_history_routing.CausalHistoryRouting.stream_blocks = 12",
    "train.prompts_per_step = 2",
)


def aligns(config: str) -> bool:
    text = (packaged_folder() / config).read_text(encoding="utf-8")
    return "include 'papers/" in text


RECIPES = [config for config in packaged_configs() if config.startswith("papers/") and aligns(config)]


def flags(lines: tuple[str, ...]) -> list[str]:
    return [word for line in lines for word in ("--gin_param", line)]


def loaded(config: str, *more: str) -> Configuration:
    return load_config("train", gin_files=[config], gin_params=[*EMBEDDED, *more], flags={"output_dir": "nowhere"})


def test_the_two_gaussian_papers_are_among_the_recipes():
    assert {"papers/raven_cm_grpo.gin", "papers/flow_grpo.gin"} <= set(RECIPES)


@pytest.mark.parametrize("config", RECIPES)
def test_a_papers_recipe_takes_a_training_step(config: str, capsys: pytest.CaptureFixture[str]):
    used = loaded(config).operative_config()
    known = [line for line in SMALL if line.split(".")[0] in used]
    arguments = ["train", "--gin_file", config, "--output_dir", "nowhere", "--dry_run"]
    assert main([*arguments, *flags((*EMBEDDED, *known))]) == 0
    assert "one step done, nothing written" in capsys.readouterr().out
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("config", RECIPES)
def test_a_papers_recipe_says_what_it_requires(config: str, capsys: pytest.CaptureFixture[str]):
    for missing in ("GENERATOR", "REWARD", "JUDGE"):
        given = tuple(line for line in EMBEDDED if not line.startswith(missing))
        assert main(["train", "--gin_file", config, "--dry_run", *flags(given)]) != 0
        assert missing in capsys.readouterr().err


BACKBONES = [c for c in packaged_configs() if c.startswith("backbones/") and c != "backbones/shared.gin"]


@pytest.mark.parametrize("config", RECIPES)
def test_a_papers_recipe_takes_every_released_generator(config: str):
    """By its file alone, given after the paper's; nothing is built, so no weights are looked for."""
    more = [line for line in EMBEDDED if not line.startswith("GENERATOR")]
    for backbone in BACKBONES:
        found = load_config("train", gin_files=[config, backbone], gin_params=more, flags={"output_dir": "nowhere"})
        assert "@wan.generator()" in found.operative_config()


def parts(config: str) -> dict[str, Any]:
    return loaded(config).build()


def test_cm_grpo_has_ravens_numbers():
    found = parts("papers/raven_cm_grpo.gin")
    surrogate = found["surrogate"]
    assert isinstance(surrogate, GaussianRegression)
    trained = surrogate.trained
    assert (trained.steps, trained.step_weights, trained.block_weights, trained.history_grad) == (
        OneRandomStep(), PlainSteps(), FutureParticipation(-1.0), True
    )  # fmt: skip
    assert found["advantage"] == RavenAdvantage(clip=5.0)
    assert found["exploration"].group_size * found["prompts_per_step"] == 256
    assert found["optimizer"] == AdamW(5e-6, 0.0, 0.999, 1e-10 / 100, 0.0, 1000 / 100)
    lora = found["adaptation"]
    assert lora.rank == 256 and lora.alpha in (None, 256) and found["max_steps"] == 160


def test_kvpo_has_the_papers_layout_and_its_deployed_form_fits_the_window():
    paper, deployed = (parts(f"papers/{name}.gin")["exploration"] for name in ("kvpo", "kvpo_deployed"))
    assert (paper.sink, paper.routed_frames, paper.recent, paper.routed_blocks) == (3, 6, 3, 5)
    assert paper.routed_steps(embedded_recipe()) == (True, True, False, False)
    assert deployed.sink + deployed.routed_frames + deployed.recent + 3 == 12
    found = parts("papers/kvpo.gin")
    assert found["advantage"] == AnchorRelative() and found["regularizer"] == BranchKL(10.0)
    assert (found["surrogate"].clip_low, found["surrogate"].clip_high) == (0.1, 0.2)
    assert found["updates_per_rollout"] >= 2


@pytest.mark.parametrize("config", RECIPES)
def test_a_papers_recipe_is_short(config: str):
    assert len((packaged_folder() / config).read_text(encoding="utf-8").splitlines()) <= 20


def test_flow_grpo_has_its_releases_numbers():
    found = parts("papers/flow_grpo.gin")
    assert found["exploration"].kernel == FlowGRPO(0.7)
    assert found["surrogate"] == GaussianRatio(clip_low=1e-4, clip_high=1e-4)
    assert found["surrogate"].trained.steps == AllSteps()
    assert found["regularizer"] == KernelKL(0.04) and found["advantage"].clip == 5.0
    assert (found["exploration"].group_size, found["prompts_per_step"], found["updates_per_rollout"]) == (24, 48, 2)
    assert found["optimizer"] == AdamW(3e-4, weight_decay=1e-4)
