"""bfloat16 autocast reaches the network's products and nothing else, in a whole training step of each paper."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.adapters import LoRA
from framework.advantages import GroupRelative
from framework.compatibility import check_recipe
from framework.optimization import AdamW, Constant
from framework.policies import Policies
from framework.precision import AsWeights, BFloat16, Precision
from framework.records import Endpoints, Predictions
from framework.rng import Streams
from framework.rollout import roll_out
from framework.selfchecks import check_ratio, replay_deviation
from framework.trainer import Trainer
from framework.types import Scene
from rewards.shapes import ShapesReward
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.gaussian_kernel import GaussianRatio, GaussianReinforce
from strategies.surrogates.gibbs_tve import GibbsTVE
from strategies.surrogates.nft import NFT
from tests.support import PROMPTS, group_plans, tiny_generator

ROUTING = CausalHistoryRouting(2, routed_frames=1, recent=1, sink=3, routed_blocks=1, stream_blocks=4)
PAPERS: dict[str, Callable[[], dict[str, Any]]] = {
    "Astrolabe": lambda: {"exploration": NoiseEndpoint(2), "surrogate": NFT(), "regularizer": VelocityKL()},
    "RAVEN": lambda: {"exploration": NoiseEndpoint(2), "surrogate": GaussianReinforce()},
    "KVPO": lambda: {"exploration": ROUTING, "surrogate": GibbsTVE()},
}


def make_trainer(precision: Precision, paper: str) -> Trainer:
    """Two prompts of a tiny generator under a paper's method."""
    generator = tiny_generator(clip_blocks=2)
    generator.precision = precision
    parts = {"advantage": GroupRelative(), "regularizer": NoRegularizer()} | PAPERS[paper]()
    keep = check_recipe(*(parts[name] for name in ("exploration", "surrogate", "advantage", "regularizer")))
    return Trainer(
        generator=generator, reward=ShapesReward(), policies=Policies(generator, LoRA(4), Constant(0.0), 0.9, seed=0),
        optimizer=AdamW(1e-3), scenes=tuple(Scene.single(prompt) for prompt in PROMPTS), seed=0, prompts_per_step=2,
        updates_per_rollout=1, micro_batch_size=48, keep=keep, **parts,
    )  # fmt: skip


@dataclass
class Seen:
    """Which dtypes went in and out of the network's calls."""

    timesteps: set[torch.dtype]
    products: set[torch.dtype]
    embeddings: set[torch.dtype]


def watch(network: nn.Module) -> Seen:
    """Hooks on the calls of a network, a product inside a block, and the time embedding."""
    seen = Seen(set(), set(), set())

    def called(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.timesteps.add(arguments[1].dtype)

    network.register_forward_pre_hook(called)
    blocks = dict(network.named_modules())
    blocks["blocks.0.ffn.net.2"].register_forward_hook(lambda m, a, out: seen.products.add(out.dtype))
    blocks["condition_embedder.time_embedder"].register_forward_hook(lambda m, a, out: seen.embeddings.add(out.dtype))
    return seen


def check_mixed_step(precision: Precision, paper: str) -> None:
    """One whole step: products in bf16, everything that is kept or accumulated in float32, and the policy moves."""
    trainer = make_trainer(precision, paper)
    seen = watch(trainer.generator.network)
    before = {name: p.detach().clone() for name, p in trainer.policies.parameters.items()}
    metrics = trainer.step()
    assert seen.products == {torch.bfloat16}
    assert seen.timesteps == seen.embeddings == {torch.float32}
    tensors = trainer.policies.tensors().values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    states = [v for state in trainer.torch_optimizer.state.values() for k, v in state.items() if k != "step"]
    assert {state.dtype for state in states} == {torch.float32}
    assert any(not torch.equal(before[name], p) for name, p in trainer.policies.parameters.items())
    loss = metrics["train/loss"]
    assert isinstance(loss, Tensor) and loss.dtype in (torch.float32, torch.float64)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in metrics.values())


@pytest.mark.parametrize("paper", PAPERS)
def test_a_whole_step_in_bfloat16_keeps_what_must_be_wide(paper: str) -> None:
    check_mixed_step(BFloat16(), paper)


class Float16(Precision):
    """A planted error: the other half precision, whose exponent is too short for gradients."""

    def around(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, torch.float16)


@pytest.mark.parametrize("wrong", [AsWeights(), Float16()], ids=["no autocast", "float16"])
def test_the_check_sees_another_precision(wrong: Precision) -> None:
    with pytest.raises(AssertionError):
        check_mixed_step(wrong, "Astrolabe")


def test_the_check_sees_an_embedding_that_autocast_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.autocast

    def never_off(device: str, *arguments: Any, enabled: bool = True, **options: Any) -> AbstractContextManager:
        return real(device, torch.bfloat16)

    monkeypatch.setattr(torch, "autocast", never_off)
    with pytest.raises(AssertionError):
        check_mixed_step(BFloat16(), "Astrolabe")


def test_a_rollout_in_bfloat16_leaves_float32_latents_near_those_of_float32() -> None:
    generator = tiny_generator(clip_blocks=2)
    kernel = NoiseEndpoint(2).kernel
    plans, keep = group_plans(blocks=2), frozenset({Predictions})
    wide = roll_out(generator, plans, kernel, keep)
    generator.precision = BFloat16()
    narrow = roll_out(generator, plans, kernel, keep)
    latents, velocities = narrow[Endpoints].latents, narrow[Predictions].velocities
    assert latents.dtype == velocities.dtype == torch.float32
    gap = (latents - wide[Endpoints].latents).norm() / wide[Endpoints].latents.norm()
    assert 0 < gap < 0.05, "rounding, and no more"
    assert replay_deviation(generator, narrow) < 0.05


@pytest.mark.parametrize("surrogate", [GaussianRatio(), GibbsTVE()], ids=["gaussian", "gibbs"])
@pytest.mark.parametrize("precision", [AsWeights(), BFloat16()], ids=["float32", "bfloat16"])
def test_a_ratio_is_one_before_the_first_update(surrogate: Any, precision: Precision) -> None:
    generator, streams = tiny_generator(clip_blocks=4), Streams(0)
    generator.precision = precision
    exploration = ROUTING if isinstance(surrogate, GibbsTVE) else NoiseEndpoint(2)
    scenes = [Scene.single(prompt) for prompt in PROMPTS[:2]]
    plans = exploration.plan(scenes, [0, 1], generator.recipe, streams)
    tape = roll_out(generator, plans, exploration.kernel, surrogate.reads)
    (line,) = check_ratio(generator, surrogate, tape, streams, clips=3)
    assert line.endswith("= 0.0e+00")


def test_a_generator_that_answers_twice_differently_has_no_ratio_of_one() -> None:
    generator, streams = tiny_generator(clip_blocks=2), Streams(0)
    plans = NoiseEndpoint(2).plan([Scene.single(PROMPTS[0])], [0], generator.recipe, streams)
    tape = roll_out(generator, plans, NoiseEndpoint(2).kernel, GaussianRatio.reads)
    for module in generator.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    generator.network.train()
    with pytest.raises(ValueError, match=r"GaussianRatio's ratio is not 1 before the first update"):
        check_ratio(generator, GaussianRatio(), tape, streams, clips=2)
    assert check_ratio(generator, NFT(), tape, streams, clips=2) == []
