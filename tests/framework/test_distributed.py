"""Any number of ranks makes the update that one rank makes; a rank that fails or drifts is noticed, and named."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.advantages import GroupRelative
from framework.data.scenes import draw_scenes
from framework.devices import local_device
from framework.distributed import Distribution, Share, World, fingerprint, ranks_started
from framework.evaluation import evaluate_policy
from framework.optimization import Constant
from framework.policies import Policies
from framework.types import Advantage, GroupPlan, Scene, Scores
from rewards.shapes import ShapesReward
from tests.ranks import RECIPES, TIMEOUT, MovedLoRA, WideLoRA, make, results, run_ranks, train
from tests.support import PROMPTS, Brightness, close, group_plans, holds, refuted, tiny_generator

# who does what


Sharing = Callable[[World, list[GroupPlan]], Share]


def check_every_clip_counts_once(sharing: Sharing, size: int, prompts: int, branches: int) -> None:
    """Ranks do equally much, groups stay whole and apart, and each clip of the step counts on exactly one rank."""
    plans = group_plans([f"prompt {i}" for i in range(prompts)], branches)
    shares = [sharing(World(rank, size), plans) for rank in range(size)]
    each = -(-prompts // size)
    counts = torch.zeros(prompts * branches, dtype=torch.long)
    for share in shares:
        assert len(share.plans) == each and len(share.rows) == len(share.counted) == each * branches
        assert len({plan.group for plan in share.plans}) == each
        for plan, rows in zip(share.plans, share.rows.split(branches), strict=True):
            original = plans[int(rows[0]) // branches]
            assert torch.equal(rows, rows[0] + torch.arange(branches)) and int(rows[0]) % branches == 0
            assert (plan.scene, plan.prefix_seed, plan.branches) == (
                original.scene, original.prefix_seed, original.branches)  # fmt: skip
        counts[share.rows[share.counted]] += 1
    assert torch.equal(counts, torch.ones_like(counts))
    order = torch.cat([share.rows[share.counted] for share in shares])
    assert torch.equal(order, torch.arange(prompts * branches))


def counting_repeats(world: World, plans: list[GroupPlan]) -> Share:
    share = world.share(plans)
    return replace(share, counted=torch.ones_like(share.counted))


def merging_repeats(world: World, plans: list[GroupPlan]) -> Share:
    """A repeated group under the id of the original: its clips would be their own siblings."""
    share = world.share(plans)
    firsts = share.rows[:: len(plans[0].branches)].tolist()
    return replace(share, plans=tuple(plans[row // len(plans[0].branches)] for row in firsts))


def dealing_clips(world: World, plans: list[GroupPlan]) -> Share:
    """Clips dealt like cards: groups straddle ranks."""
    share = world.share(plans)
    return replace(share, rows=share.rows.roll(1))


SHARINGS = (st.integers(1, 9), st.integers(1, 12), st.integers(1, 5))


def test_for_any_ranks_prompts_and_group_size_every_clip_counts_on_exactly_one_rank():
    holds(partial(check_every_clip_counts_once, World.share), *SHARINGS)


@pytest.mark.parametrize("mutant", [counting_repeats, merging_repeats, dealing_clips])
def test_the_sharing_check_sees_clips_that_count_twice_and_groups_that_are_cut(mutant: Sharing):
    refuted(partial(check_every_clip_counts_once, mutant), *SHARINGS)


def test_one_rank_is_given_back_what_it_gave():
    world, plans = World(), group_plans()
    share = world.share(plans)
    assert list(share.plans) == plans and bool(share.counted.all())
    scores = Scores.of({"a": torch.rand(4)})
    assert world.gather_scores(scores, 4) is scores
    metrics = {"loss": torch.ones(())}
    assert world.sum_update(metrics, {}) == metrics and world.most(3) == 3 and not world.any(False)
    world.check_equal({"a": torch.ones(1)}, "nothing to compare")


# the same update


SINGLE: dict[tuple[str, int], dict[str, Any]] = {}


def single(recipe: str, prompts: int, folder: Path) -> dict[str, Any]:
    """Two steps on one rank, once."""
    key = recipe, prompts
    if key not in SINGLE:
        (SINGLE[key],) = results(1, folder / "single", partial(train, recipe=recipe, prompts_per_step=prompts))
    return SINGLE[key]


def check_same_run(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-9) -> None:
    """Metrics, gradients and every policy agree; the tolerance is relative to the largest entry of a tensor.

    float64 rounds at 1e-16; sums of thousands of terms in another order, and softmaxes of small energies, leave 1e-13.
    Rewards are computed in float32.
    """
    assert one["samples_seen"] == other["samples_seen"] and len(one["gradients"]) == len(other["gradients"])
    for left, right in zip(one["metrics"], other["metrics"], strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            rel = 1e-6 if name.startswith("reward") else tolerance
            assert right[name] == pytest.approx(value, rel=rel, abs=1e-12), name
    for left, right in zip(one["gradients"], other["gradients"], strict=True):
        assert left.keys() == right.keys() and left
        for name, gradient in left.items():
            assert float(gradient.abs().max()) > 0
            close(gradient, right[name], atol=tolerance * float(gradient.abs().max()))
    for name, value in one["tensors"].items():
        close(value, other["tensors"][name], atol=tolerance * float(value.abs().max()))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_several_ranks_make_the_update_of_one(recipe: str, size: int, tmp_path: Path):
    alone = single(recipe, 4, tmp_path)
    for rank in results(size, tmp_path / "ranks", partial(train, recipe=recipe)):
        check_same_run(alone, rank)


@pytest.mark.parametrize("recipe", ["nft", "kvpo"])
@pytest.mark.parametrize(("prompts", "size"), [(5, 2), (3, 4)])
def test_prompts_that_do_not_come_out_even_change_nothing(recipe: str, prompts: int, size: int, tmp_path: Path):
    alone = single(recipe, prompts, tmp_path)
    for rank in results(size, tmp_path / "ranks", partial(train, recipe=recipe, prompts_per_step=prompts)):
        check_same_run(alone, rank)


@pytest.mark.parametrize("recipe", ["nft", "kvpo"])
def test_micro_batches_on_several_ranks_change_nothing(recipe: str, tmp_path: Path):
    clips = {"nft": 2, "kvpo": 4}[recipe]  # half a group of NFT's, one whole group with its anchor of KVPO's
    for rank in results(2, tmp_path / "ranks", partial(train, recipe=recipe, micro_batch_size=clips)):
        check_same_run(single(recipe, 4, tmp_path), rank)


def test_the_reference_that_moves_by_a_measured_distance_moves_on_all_ranks_at_once(tmp_path: Path):
    """What makes the comparison of the recipe worth something: its decisions were taken."""
    alone = single("astrolabe", 4, tmp_path)["metrics"]
    assert [step["train/reference_reset"] for step in alone] == [0, 1]
    assert alone[1]["train/frac_penalised"] > 0 and alone[1]["train/penalty"] > 0


class Averaging(World):
    """A planted error: DDP's mean over ranks of what each has already divided by the count of all."""

    def sum_update(self, metrics, parameters):
        metrics = super().sum_update(metrics, parameters)
        for parameter in parameters.values():
            parameter.grad = parameter.grad / self.size
        return metrics


class ScoresOfItsOwn(World):
    """A planted error: deviations and percentiles over the clips of one rank."""

    def gather_scores(self, scores, count):
        values = {name: torch.cat([value] * self.size)[:count] for name, value in scores.values.items()}
        return Scores.of(values)


class CountingRepeats(World):
    """A planted error: the repeated prompt of an uneven step counts."""

    def share(self, plans):
        return counting_repeats(World(self.rank, self.size), list(plans))


class LocallyNormalised(Policies):
    """A planted error: each rank takes the mean over its own clips, and the ranks take the mean of that."""

    def backward(self, loss, probes, clips, total, frozen=None):
        return super().backward(loss, probes, clips, 2 * len(probes), frozen)


def wrong(world: World, recipe: str, kind: type[World], **changes: Any) -> dict[str, Any]:
    return train(kind(world.rank, world.size), recipe, **changes)


def wrong_mean(world: World, recipe: str, **changes: Any) -> dict[str, Any]:
    policies = LocallyNormalised(tiny_generator(torch.float64, clip_blocks=2), WideLoRA(4), Constant(0.0), 0.9, seed=0)
    return train(world, recipe, policies=policies, generator=policies.generator, **changes)


@pytest.mark.parametrize("kind", [Averaging, ScoresOfItsOwn, CountingRepeats])
def test_the_comparison_sees_a_wrong_reduction(kind: type[World], tmp_path: Path):
    planted = results(2, tmp_path / "ranks", partial(wrong, recipe="nft", kind=kind, prompts_per_step=5))
    with pytest.raises(AssertionError):
        check_same_run(single("nft", 5, tmp_path), planted[0])


def test_the_comparison_sees_a_mean_over_the_clips_of_a_rank_in_place_of_those_of_the_step(tmp_path: Path):
    planted = results(2, tmp_path / "ranks", partial(wrong_mean, recipe="nft", prompts_per_step=5))
    with pytest.raises(AssertionError):
        check_same_run(single("nft", 5, tmp_path), planted[0])


def in_float32(world: World) -> dict[str, Any]:
    """As it ships: adapters, latents and noise in float32."""
    generator = tiny_generator(clip_blocks=2)
    policies = Policies(generator, MovedLoRA(4), Constant(0.0), 0.9, seed=0)
    return train(world, "nft", 1, generator=generator, policies=policies)


def test_in_float32_gradients_agree_to_its_rounding(tmp_path: Path):
    (alone,) = results(1, tmp_path / "single", in_float32)
    (ranked, _) = results(2, tmp_path / "ranks", in_float32)
    for name, gradient in alone["gradients"][0].items():
        close(gradient, ranked["gradients"][0][name], atol=1e-4 * float(gradient.abs().max()))


# gates and failed scores


@dataclass(frozen=True)
class FailingOn(Brightness):
    """A reward that fails for clips of chosen prompts."""

    prompts: tuple[str, ...] = ()

    def score(self, videos):
        failed = torch.tensor([prompt in self.prompts for prompt in videos.prompts])
        return Scores.of({k: v.masked_fill(failed, torch.nan) for k, v in super().score(videos).values.items()})


def first_prompts() -> tuple[str, ...]:
    """Those of the first of two ranks in step 0."""
    scenes, _ = draw_scenes([Scene.single(prompt) for prompt in PROMPTS], step=0, count=4, seed=0)
    return tuple(scene.prompt for scene in scenes[:2])


def failing(world: World, prompts: tuple[str, ...]) -> dict[str, Any]:
    return train(world, "nft", 2, reward=FailingOn(prompts))


@pytest.mark.filterwarnings("ignore:std")
def test_a_rank_whose_clips_all_failed_still_takes_its_part(tmp_path: Path):
    prompts = first_prompts()
    (alone,) = results(1, tmp_path / "single", failing, prompts)
    assert alone["metrics"][0]["train/active_clips"] == 8
    for rank in results(2, tmp_path / "ranks", failing, prompts):
        check_same_run(alone, rank)


@dataclass(frozen=True)
class Closed(GroupRelative):
    """A rule whose gate lets nothing through."""

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        advantage = super().__call__(scores, groups, anchors)
        return replace(advantage, active=torch.zeros_like(advantage.active))


def gated(world: World) -> dict[str, Any]:
    return train(world, "nft", 2, advantage=Closed())


def test_where_no_clip_of_any_rank_is_active_no_rank_moves(tmp_path: Path):
    outcomes = results(2, tmp_path, gated)
    assert all(not outcome["gradients"] for outcome in outcomes)


def windowed(world: World) -> Any:
    """Scores of clips with a window more on each rank."""
    n = world.rank + 1
    values = {"a": torch.full((2,), float(world.rank))}
    scores = replace(Scores.of(values), windows={"a": torch.full((2, n), float(world.rank))})
    gathered = world.gather_scores(scores, 3)
    return {"values": gathered.values["a"], "valid": gathered.valid["a"], "windows": gathered.windows["a"]}


def test_windows_of_ranks_with_fewer_are_widened_with_nothing(tmp_path: Path):
    for rank in results(2, tmp_path, windowed):
        assert rank["values"].tolist() == [0, 0, 1] and rank["valid"].tolist() == [True] * 3
        assert torch.equal(rank["windows"].isnan(), torch.tensor([[False, True], [False, True], [False, False]]))


# evaluation


def evaluated(world: World) -> dict[str, Any]:
    scenes = [Scene.single(prompt) for prompt in PROMPTS[:5]]
    result = evaluate_policy(tiny_generator(clip_blocks=2), ShapesReward(), scenes, 2, 0, world=world)
    return {**result.scores, "frames": result.videos.frames, "prompts": result.videos.prompts}


def test_an_evaluation_shared_by_ranks_is_that_of_one(tmp_path: Path):
    (alone,) = results(1, tmp_path / "single", evaluated)
    ranks = results(2, tmp_path / "ranks", evaluated)
    for rank in ranks:
        for name in ("VQ", "MQ", "TA"):
            close(rank[name], alone[name], atol=1e-4)
    assert ranks[0]["prompts"] == alone["prompts"] == list(PROMPTS[:5])
    assert float((ranks[0]["frames"].float() - alone["frames"].float()).abs().max()) <= 1
    assert ranks[1]["prompts"] == [*PROMPTS[3:5], PROMPTS[4]]


# ranks that drift apart


def check_fingerprint(print_of: Callable[[Tensor], Tensor], seed: int, entries: int, change: str) -> None:
    """One changed bit, or two entries that changed places, are seen."""
    random = torch.Generator().manual_seed(seed)
    tensor = torch.randn(entries, generator=random)
    other = tensor.clone()
    i, j = torch.randperm(entries, generator=random)[:2].tolist()
    if change == "bit":
        other.view(torch.int32)[i] ^= 1 << (seed % 32)
    else:
        other[[i, j]] = other[[j, i]]
    assert int(print_of(tensor)) != int(print_of(other)) and int(print_of(tensor)) == int(print_of(tensor.clone()))


FINGERPRINTS = (st.integers(0, 2**20), st.integers(2, 300), st.sampled_from(["bit", "swap"]))


def test_a_fingerprint_sees_every_bit_and_every_place():
    holds(partial(check_fingerprint, fingerprint), *FINGERPRINTS)


@pytest.mark.parametrize("mutant", [lambda t: t.view(torch.int32).long().sum(), lambda t: t.sum().round()])
def test_the_fingerprint_check_sees_one_that_ignores_places_or_small_changes(mutant: Callable[[Tensor], Tensor]):
    refuted(partial(check_fingerprint, mutant), *FINGERPRINTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_every_dtype_has_a_fingerprint(dtype: torch.dtype):
    assert int(fingerprint(torch.arange(6).to(dtype).view(2, 3))) != int(fingerprint(torch.arange(1, 7).to(dtype)))


def drifting(world: World, name: str) -> None:
    """Rank 1 changes the last bit of one entry after the first of three steps."""
    trainer = make("nft", world)
    trainer.step()
    if world.rank == 1:
        trainer.policies.tensors()[name].data.view(torch.int64).flatten()[3] += 1
    trainer.step()


def test_one_flipped_bit_on_one_rank_is_named(tmp_path: Path):
    name = "current/blocks.1.ffn.net.2.lora_B.default.weight"
    for outcome in run_ranks(2, tmp_path, drifting, name):
        assert outcome.code == 1
        assert "RanksDiverged: step 2" in outcome.error and "ranks [1] hold something else" in outcome.error
        assert "first 'current/" in outcome.error  # its gradients differ by then, so others of that policy may as well


class Deaf(World):
    """A planted error: everybody keeps gradients of its own, and the loss alone is reduced."""

    def sum_update(self, metrics, parameters):
        return dict(metrics)


def deaf(world: World) -> dict[str, Any]:
    return train(Deaf(world.rank, world.size), "nft")


def test_ranks_that_do_not_reduce_their_gradients_are_stopped_after_the_first_step(tmp_path: Path):
    for outcome in run_ranks(2, tmp_path, deaf):
        assert outcome.code == 1 and "RanksDiverged: step 1" in outcome.error


def configured(world: World) -> None:
    world.check_text(f"seed = {world.rank // 2}", "the configuration")


def test_a_rank_that_was_given_another_configuration_is_named(tmp_path: Path):
    for outcome in run_ranks(3, tmp_path, configured):
        assert outcome.code == 1 and "the configuration" in outcome.error and "ranks [2]" in outcome.error


# ranks that fail


def raising(world: World) -> None:
    """Rank 1 fails in its second step, outside of any collective."""
    trainer = make("nft", world)
    trainer.step()
    if world.rank == 1:
        raise RuntimeError("the planted failure of rank 1")
    trainer.step()


def test_a_rank_that_raises_ends_the_others_within_the_timeout(tmp_path: Path):
    other, failed = run_ranks(2, tmp_path, raising)
    assert "RuntimeError: the planted failure of rank 1" in failed.error and "in raising" in failed.error
    assert other.code == 1 and other.seconds < failed.seconds + TIMEOUT
    assert "framework/distributed.py" in other.error  # where it waited


def sleeping(world: World, folder: Path) -> None:
    """Rank 1 never comes while the other lives, whose traceback is the last thing that it writes."""
    while world.rank == 1 and not (max(folder.iterdir()) / "0.txt").exists():
        time.sleep(0.01)
    world.most(0)


def test_a_rank_that_does_not_come_ends_the_others_after_the_timeout(tmp_path: Path):
    other, _ = run_ranks(2, tmp_path, sleeping, tmp_path, timeout=2.0)
    assert other.code == 1 and other.seconds > 1.5  # killed from outside, the code would be another
    assert "timed out" in other.error.lower() or "timeout" in other.error.lower()


# the launcher


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE=2 but the environment lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        ranks_started()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="'two'"):
        ranks_started()
    monkeypatch.delenv("WORLD_SIZE")
    assert ranks_started() == 1


def test_cuda_is_the_gpu_of_the_rank_and_one_gpu_for_all_is_refused(monkeypatch: pytest.MonkeyPatch):
    assert local_device("cuda:3") == "cuda:3" and local_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert local_device("cuda") == "cuda:5" and local_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="every rank on one GPU; give --device cuda"):
        local_device("cuda:3")


@pytest.mark.parametrize(("changes", "said"), [({"timeout_s": 0}, "timeout_s"), ({"checksum_every": -1}, "checksum")])
def test_a_wrong_distribution_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Distribution(**changes)
