"""The root builds, proves, trains and reports; what cannot work is refused before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from backbones.history import SinkWindow
from framework.adapters import Adaptation, LoRA, load_adaptation
from framework.advantages import GroupRelative
from framework.anchored_advantages import AnchorRelative
from framework.commands.train import train
from framework.compatibility import IncompatibleRecipe
from framework.data.scenes import PromptFile, ShapesCaptions
from framework.evaluation import HeldOut
from framework.kernels import Ode
from framework.optimization import AdamW, Constant, Ramp
from framework.types import Scores, VideoBatch
from rewards.failure import SkipComponent
from rewards.shapes import ShapesReward
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.none import NoRegularizer
from strategies.surrogates.gaussian_kernel import GaussianReinforce
from strategies.surrogates.gibbs_tve import GibbsTVE
from strategies.surrogates.nft import NFT
from tests.framework.test_trainer import LEVELS, TAGS, ReadsTransitions
from tests.support import PROMPTS, tiny_generator


def held_out(**changes: Any) -> HeldOut:
    fields = {"scenes": ShapesCaptions(held_out=True, limit=2), "reward": ShapesReward(), "members": 2} | changes
    return HeldOut(**fields)


def run(folder: Path, adaptation: Adaptation | None = None, **changes: Any) -> Path | None:
    """`train` on the tiny generator; any argument can be changed."""
    arguments: dict[str, Any] = {
        "generator": tiny_generator(clip_blocks=2), "exploration": NoiseEndpoint(2),
        "surrogate": NFT(level_weights=LEVELS), "reward": ShapesReward(), "advantage": GroupRelative(),
        "regularizer": NoRegularizer(), "adaptation": adaptation or LoRA(4), "optimizer": AdamW(1e-3),
        "behaviour_decay": Constant(0.0), "scenes": ShapesCaptions(limit=4), "evaluation": held_out(),
        "output_dir": str(folder), "max_steps": 2, "prompts_per_step": 2,
    } | changes  # fmt: skip
    return train(**arguments)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert run(folder, operative_config="train.seed = 0") == folder
    return folder


def test_a_run_leaves_its_files(finished: Path):
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.gin", "command.txt", "env.json", "metrics.jsonl", "before_after.png", "before_after.mp4",
        "before_after.gif", "reward_curve.png", "gains.md", "summary.json", "evaluation.safetensors",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
    } <= files  # fmt: skip
    assert (finished / "config.gin").read_text() == "train.seed = 0"
    recorded = lines(finished)
    assert [line["step"] for line in recorded] == [0, 1, 2, 2]
    assert [line["samples_seen"] for line in recorded] == [0, 4, 8, 8]
    assert {"eval/reward/VQ", "eval/reward/MQ", "eval/reward/TA", "eval/reward/total"} <= recorded[0].keys()
    assert recorded[1].keys() >= TAGS


def test_the_saved_adapter_is_the_averaged_policy_that_was_judged(finished: Path):
    generator = tiny_generator(clip_blocks=2)
    load_adaptation(generator.network, finished / "adapter")
    result = held_out().judge(generator)
    for name, value in result.scores.items():
        assert lines(finished)[-1][f"eval/reward/{name}"] == pytest.approx(float(value.mean()), abs=1e-6)
    start = held_out().judge(tiny_generator(clip_blocks=2))
    assert any(not torch.equal(value, start.scores[name]) for name, value in result.scores.items())


def test_equal_runs_write_equal_metrics(finished: Path, tmp_path: Path):
    run(tmp_path / "two", operative_config="train.seed = 0")
    timed = lambda line: {k: v for k, v in line.items() if not k.startswith("time/")}  # noqa: E731
    assert [timed(line) for line in lines(tmp_path / "two")] == [timed(line) for line in lines(finished)]


def test_a_dry_run_does_a_step_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path / "dry", dry_run=True) is None
    assert list(tmp_path.iterdir()) == []
    said = "".join(capsys.readouterr())
    assert "dry run: one step done, nothing written; 2 steps would train on 8 clips" in said
    assert "replay of a stored rollout" in said and "LoRA rank 4 on 20 modules" in said


class Half(ShapesReward):
    """Has no motion score for every other clip."""

    def score(self, videos: VideoBatch) -> Scores:
        scores = super().score(videos)
        unseen = torch.arange(len(videos)) % 2 == 1
        return Scores.of({n: v.masked_fill(unseen, torch.nan) if n == "MQ" else v for n, v in scores.values.items()})


def test_a_start_that_cannot_be_judged_ends_the_run_before_it_trains_and_not_at_its_report(tmp_path: Path):
    with pytest.raises(ValueError, match="before training has no 'MQ' for 2 of 4 clips"):
        run(tmp_path / "run", evaluation=held_out(reward=Half()))
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    with pytest.raises(ValueError, match="no reward signal to learn from"):
        run(tmp_path / "other", reward=SkipComponent(ShapesReward()))
    assert not (tmp_path / "other").exists()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_folder_of_another_run_is_refused_and_left_as_it_was(finished: Path):
    before = everything(finished)
    with pytest.raises(ValueError, match=r"output_dir=.*holds another run already"):
        run(finished)
    assert everything(finished) == before


def check_refused(tmp_path: Path, message: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "refused", **changes)
    assert not (tmp_path / "refused").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        run(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be written"):
        run(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="cannot be written"):
        run(tmp_path / ("long" * 100))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["max_steps", "updates_per_rollout", "micro_batch_size"])
def test_counts_below_one_are_refused_before_anything_is_created(tmp_path: Path, name: str):
    check_refused(tmp_path, rf"train\.{name} must be at least 1, got 0", **{name: 0})


def test_more_prompts_a_step_than_there_are_is_refused_before_anything_is_created(tmp_path: Path):
    check_refused(tmp_path, "prompts_per_step=5 must lie in 1 … 4", prompts_per_step=5)


def test_judging_on_trained_prompts_is_refused(tmp_path: Path):
    check_refused(tmp_path, "both trained on and judged", evaluation=held_out(scenes=ShapesCaptions(limit=2)))
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPTS[3]}\n{ShapesCaptions().scenes()[1].prompt}\n")
    check_refused(tmp_path, "1 prompts are both trained", evaluation=held_out(scenes=PromptFile(str(file))))


def test_a_surrogate_without_a_ratio_is_refused_several_updates_and_a_lag(tmp_path: Path):
    for changes, message in (
        ({"updates_per_rollout": 2}, "updates_per_rollout=2"),
        ({"behaviour_decay": Ramp()}, "Ramp"),
    ):
        with pytest.raises(IncompatibleRecipe, match=rf"GaussianReinforce has no ratio.*{message}.*GaussianRatio"):
            run(tmp_path / "refused", surrogate=GaussianReinforce(), **changes)
    assert not (tmp_path / "refused").exists()


ROUTED = CausalHistoryRouting(2, routed_frames=2, recent=2, sink=3, routed_blocks=1, stream_blocks=5)


def test_the_clips_of_a_step_are_counted_with_their_anchors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = {"exploration": ROUTED, "surrogate": GibbsTVE(), "advantage": AnchorRelative(), "dry_run": True}
    run(tmp_path / "dry", generator=tiny_generator(clip_blocks=5), **recipe)
    said = "".join(capsys.readouterr())
    assert "step: 2 prompts × (2 branches + 1 anchor) = 6 clips, micro-batches of up to 6, 1 update(s)" in said
    assert "nothing written; 2 steps would train on 12 clips" in said
    run(tmp_path / "dry", dry_run=True)
    assert "step: 2 prompts × 2 branches = 4 clips, " in "".join(capsys.readouterr())


def test_routes_that_the_history_cannot_show_are_refused_before_anything_is_created(tmp_path: Path):
    """At the first pivot the window has not rolled and nothing would be missing."""
    generator = tiny_generator(clip_blocks=5, policy=SinkWindow(sink=2, window=8, relative=True))
    recipe = {"exploration": ROUTED, "surrogate": GibbsTVE(), "advantage": AnchorRelative()}
    check_refused(tmp_path, r"CausalHistoryRouting\.sink=3: .* SinkWindow keeps 2 of them; set sink to at most 2",
                  generator=generator, **recipe)  # fmt: skip


def test_an_incompatible_recipe_is_refused_before_anything_is_created(tmp_path: Path):
    with pytest.raises(IncompatibleRecipe, match="kernel Ode"):
        run(tmp_path / "refused", surrogate=ReadsTransitions(), exploration=NoiseEndpoint(2, kernel=Ode()))
    assert not (tmp_path / "refused").exists()
