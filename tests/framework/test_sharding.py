"""A network that is spread over the ranks trains what a whole one trains, and is really spread."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from framework import sharding
from framework.adapters import FullFineTuning, LoRA
from framework.data.scenes import draw_scenes
from framework.distributed import World, held, whole
from framework.nonfinite import Skip
from framework.optimization import AdamW, Constant
from framework.policies import Policies
from framework.sharding import check_symmetric, shard_base
from framework.trainer import combine
from framework.types import Advantage, Objective, Scene, Scores, Segment, VideoBatch
from rewards.shapes import ShapesReward
from tests.framework.test_distributed import check_same_run
from tests.ranks import MovedLoRA, WideLoRA, make, noting, results, run_ranks, train
from tests.support import PROMPTS, tiny_generator


def sharded(
    world: World, recipe: str, dtype: torch.dtype = torch.float64, shard: bool = True, methods: bool = True
) -> dict[str, Any]:
    """Two steps; methods: whether methods that run outside of forward are made known."""
    generator = tiny_generator(dtype, clip_blocks=2)
    if not methods:
        generator.forward_methods = ()  # pyright: ignore[reportAttributeAccessIssue]
    adaptation = WideLoRA(4) if dtype == torch.float64 else MovedLoRA(4)
    policies = Policies(generator, adaptation, Constant(0.0), 0.9, seed=0)
    if shard:
        policies.spread(partial(shard_base, generator, world))
    outcome = train(world, recipe, generator=generator, policies=policies, optimizer=noting(), prompts_per_step=3)
    frozen = {n: p for n, p in generator.network.named_parameters() if not p.requires_grad}
    return outcome | {
        "frozen": sum(p.numel() for p in frozen.values()),
        "here": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in frozen.values()),
        "trained": sorted({str(p.dtype) for p in policies.parameters.values()}),
        "base": sorted({str(p.dtype) for p in frozen.values()}),
        "whole": all(not isinstance(p, DTensor) for p in policies.parameters.values()),
    }


@pytest.mark.parametrize("recipe", ["nft", "kvpo", "astrolabe"])
def test_a_sharded_base_makes_the_update_of_one_rank_that_holds_all_of_it(recipe: str, tmp_path: Path):
    (alone,) = results(1, tmp_path / "single", partial(train, recipe=recipe, prompts_per_step=3))
    for rank in results(2, tmp_path / "ranks", partial(sharded, recipe=recipe)):
        check_same_run(alone, rank)


def test_each_of_two_ranks_keeps_half_of_a_bf16_base_and_all_of_the_float32_adapters(tmp_path: Path):
    kind = torch.bfloat16
    whole = results(2, tmp_path / "whole", partial(sharded, recipe="nft", dtype=kind, shard=False))
    spread = results(2, tmp_path / "spread", partial(sharded, recipe="nft", dtype=kind))
    for one, other in zip(whole, spread, strict=True):
        assert one["here"] == one["frozen"] == other["frozen"]
        assert other["here"] <= 0.52 * other["frozen"]  # a dimension that is odd gives one rank a row more
        assert other["base"] == ["torch.bfloat16"] and other["trained"] == ["torch.float32"] and other["whole"]
        check_same_run(one, other, tolerance=0.0)  # the same numbers in the same order


def test_a_method_outside_of_forward_that_sharding_does_not_know_fails(tmp_path: Path):
    """Why `StreamingGenerator.forward_methods` is there."""
    outcome, _ = run_ranks(2, tmp_path, partial(sharded, recipe="nft", methods=False))
    assert outcome.code == 1 and "DTensor" in outcome.error


def trained_whole(world: World, recipe: str, shard: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Two steps of full fine-tuning."""
    generator = tiny_generator(dtype, clip_blocks=2)
    policies = Policies(generator, FullFineTuning(), Constant(0.5), 0.9, seed=0)
    if shard:
        policies.spread(partial(shard_base, generator, world))
    trainer = make(recipe, world, generator=generator, policies=policies, prompts_per_step=3, optimizer=AdamW(1e-4))
    metrics = [trainer.step() for _ in range(2)]
    optimizer = trainer.torch_optimizer.state.values()
    tensors = trainer.policies.tensors() | {f"{i}/{n}": v for i, s in enumerate(optimizer) for n, v in s.items()}
    return {
        "metrics": [{k: float(v) for k, v in m.items() if not k.startswith("time/")} for m in metrics],
        "tensors": {name: whole(value).detach().clone() for name, value in tensors.items()},
        "here": sum(held(value).numel() for value in tensors.values()),
        "all": sum(value.numel() for value in tensors.values()),
    }


@pytest.mark.parametrize("recipe", ["nft", "kvpo", "raven", "astrolabe"])
def test_full_fine_tuning_of_a_sharded_network_makes_the_update_of_one_rank(recipe: str, tmp_path: Path):
    """With a behaviour policy that lags and, for some, a reference: every policy is put in force on every rank."""
    (alone,) = results(1, tmp_path / "single", partial(trained_whole, recipe=recipe, shard=False))
    for rank in results(2, tmp_path / "ranks", partial(trained_whole, recipe=recipe)):
        assert rank["here"] <= 0.52 * alone["here"] and rank["all"] == alone["all"]
        for one, other in zip(alone["metrics"], rank["metrics"], strict=True):
            assert one.keys() == other.keys()
            assert all(other[name] == pytest.approx(value, rel=1e-6, abs=1e-9) for name, value in one.items())
        assert alone["tensors"].keys() == rank["tensors"].keys()
        for name, value in alone["tensors"].items():
            assert torch.allclose(rank["tensors"][name], value, rtol=1e-9, atol=1e-9), name


class Blind(ShapesReward):
    """Has no score for the clips of some prompts."""

    def __init__(self, prompts: set[str]) -> None:
        super().__init__()
        self.prompts = prompts

    def score(self, videos: VideoBatch) -> Scores:
        unseen = torch.tensor([prompt in self.prompts for prompt in videos.prompts])
        values = super().score(videos).values
        return Scores.of({name: value.masked_fill(unseen, torch.nan) for name, value in values.items()})


def troubled(world: World, recipe: str, shard: bool = True) -> list[dict[str, float]]:
    """Three steps: the last rank has no active clip; then no rank has one; then the last rank's loss is NaN."""
    generator = tiny_generator(torch.float64, clip_blocks=2)
    policies = Policies(generator, FullFineTuning(), Constant(0.5), 0.9, seed=0)
    if shard:
        policies.spread(partial(shard_base, generator, world))
    parts: dict[str, Any] = {"generator": generator, "policies": policies, "optimizer": AdamW(1e-4)}
    trainer = make(recipe, world, **parts, nonfinite=Skip(), micro_batch_size=4)
    lists: list[dict[str, float]] = []
    for step in range(3):
        scenes, _ = draw_scenes(trainer.scenes, step, 4, 0)
        trainer.reward = Blind({scene.prompt for scene in (scenes[2:], scenes[:0], scenes[:0])[step]})
        with pytest.MonkeyPatch.context() as patch:
            if step == 1:
                patch.setattr(trainer, "advantage", partial(without_active, trainer.advantage))
            if step == 2 and world.rank == world.size - 1:
                patch.setattr("framework.trainer.combine", without_number)
            metrics = trainer.step()
        lists.append({k: float(v) for k, v in metrics.items() if k.startswith("train/")})
    return lists


def without_number(*arguments: Any) -> Objective:
    objective = combine(*arguments)
    return replace(objective, per_clip=objective.per_clip * torch.nan)


def without_active(rule: Any, *arguments: Any) -> Advantage:
    advantage = rule(*arguments)
    return replace(advantage, active=torch.zeros_like(advantage.active))


@pytest.mark.parametrize("recipe", ["nft", "kvpo"])
def test_sharded_ranks_do_not_part_over_gated_empty_and_non_finite_steps(recipe: str, tmp_path: Path):
    (alone,) = results(1, tmp_path / "single", partial(troubled, recipe=recipe, shard=False))
    assert alone[1]["train/active_clips"] == 0 and alone[2] == {"train/skipped_steps": 1.0}
    for rank in results(2, tmp_path / "ranks", partial(troubled, recipe=recipe)):
        for one, other in zip(alone, rank, strict=True):
            assert other == pytest.approx(one, rel=1e-6, abs=1e-9)


def means(world: World) -> dict[str, Any]:
    """A planted error: gradients averaged over the ranks, FSDP's default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor", lambda *_: None)
        patch.setattr("torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms", lambda *_: None)
        return trained_whole(world, "nft")


def stale(world: World) -> dict[str, Any]:
    """A planted error: the root keeps what it gathered, so that another policy is put in force in the blocks only."""
    real = sharding.fully_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "fully_shard", lambda *a, **k: real(*a, **k | {"reshard_after_forward": None}))
        return trained_whole(world, "kvpo")


@pytest.mark.parametrize(("mutant", "recipe"), [(means, "nft"), (stale, "kvpo")])
def test_the_comparison_sees_means_and_a_root_that_is_not_resharded(mutant, recipe: str, tmp_path: Path):
    (alone,) = results(1, tmp_path / "single", partial(trained_whole, recipe=recipe, shard=False))
    for rank in results(2, tmp_path / "ranks", mutant):
        name = "train/grad_norm"
        assert rank["metrics"][1][name] != pytest.approx(alone["metrics"][1][name], rel=1e-3)


def test_sharding_is_refused_for_one_rank():
    generator = tiny_generator()
    with pytest.raises(ValueError, match="needs several ranks"):
        shard_base(generator, World(), LoRA(2).attach(generator.network, 0))


def switching(*frames: int) -> Scene:
    return Scene("k", (Segment(PROMPTS[0]), *(Segment(PROMPTS[1], frame) for frame in frames)))


def test_scenes_that_switch_at_different_blocks_are_refused_for_a_sharded_base():
    check_symmetric([Scene.single(prompt) for prompt in PROMPTS], 3)
    check_symmetric([switching(4), switching(6)], 3)  # both with the block at frame 6
    with pytest.raises(ValueError, match=r"same frames, got switches at \[\(0,\), \(0, 6\)\]"):
        check_symmetric([switching(), switching(4)], 3)
