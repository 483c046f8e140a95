"""What the tests share: properties that are tried and refuted, a tiny generator, and parts for tiny runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy, tuples
from torch import Tensor, nn

from backbones.embedded.generator import CONFIG, ShapesGenerator
from backbones.history import HistoryPolicy
from backbones.wan.transformer import CausalWanTransformer3DModel
from framework.data.shapes import CAPTIONS
from framework.interfaces import RewardModel
from framework.types import BranchPlan, GroupPlan, Scene, Scores, VideoBatch

SLOW_DRAWS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors)
TINY = {
    **CONFIG, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16,
}  # fmt: skip
PROMPTS = tuple(str(caption) for caption in CAPTIONS[::17])
"""Nine captions of the embedded world."""


def over(*strategies: SearchStrategy, examples: int = 50) -> Callable[[Callable], Callable]:
    """Try a test on drawn arguments."""

    def decorate(test: Callable) -> Callable:
        tried = given(*strategies)(test)
        return settings(max_examples=examples, deadline=None, suppress_health_check=SLOW_DRAWS)(tried)

    return decorate


def holds(check: Callable[..., None], *strategies: SearchStrategy, examples: int = 50) -> None:
    """Assert that a check passes for all draws."""
    over(tuples(*strategies), examples=examples)(lambda drawn: check(*drawn))()


def refuted(check: Callable[..., None], *strategies: SearchStrategy, examples: int = 100) -> None:
    """Assert that some draw makes a check fail: how a planted error proves that a property can fail at all."""
    search = given(tuples(*strategies))(lambda drawn: check(*drawn))
    with pytest.raises(AssertionError):
        settings(
            max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=SLOW_DRAWS, report_multiple_bugs=False,
        )(search)()  # fmt: skip


def close(left: Tensor, right: Tensor, atol: float, rtol: float = 0.0) -> None:
    """Assert equality to a tolerance, shapes included."""
    torch.testing.assert_close(left, right, atol=atol, rtol=rtol, check_dtype=False)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A normal sample; of equal values in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def perturb(network: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Move every parameter: fresh biases are zero, fresh norms one and fresh LoRA B zero, which would hide errors."""
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter += std * normal(1000 * seed + i, *parameter.shape).to(parameter)


def tiny_generator(
    dtype: torch.dtype = torch.float32, clip_blocks: int = 3, policy: HistoryPolicy | None = None, seed: int = 7
) -> ShapesGenerator:
    """A fresh embedded generator of 20 thousand parameters, of the same weights whenever it is asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CausalWanTransformer3DModel(**TINY)
    perturb(network)
    generator = ShapesGenerator(nn.Module.to(network, dtype), policy)  # diffusers' own warns about precision
    generator.recipe = replace(generator.recipe, clip_blocks=clip_blocks)
    return generator


def group_plans(
    prompts: Sequence[str] = PROMPTS[:2], branches: int = 2, first_block: int = 0, blocks: int = 3, seed: int = 0
) -> list[GroupPlan]:
    """Plans with a seed of their own for every prefix and every branch."""
    return [
        GroupPlan(
            group=g,
            scene=Scene.single(prompt),
            first_block=first_block,
            blocks=blocks,
            prefix_seed=10_000 * seed + g,
            branches=tuple(BranchPlan(10_000 * seed + 100 * (g + 1) + b) for b in range(branches)),
        )
        for g, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True)
class Brightness(RewardModel):
    """A reward that any video has: the mean pixel, and how much the red channel stands out."""

    @property
    def signals(self) -> tuple[str, ...]:
        return ("bright", "red")

    def score(self, videos: VideoBatch) -> Scores:
        pixels = videos.frames.float() / 255
        return Scores.of({"bright": pixels.mean((1, 2, 3, 4)), "red": pixels[:, :, 0].mean((1, 2, 3))})
