"""P6: what `armillary doctor` says a training step takes over what it took.

estimate: `framework.run_shape.estimate_step`, from shapes alone, before anything ran. measured: the peak of live tensor
bytes, counted by `LiveBytes`, from putting the adapters on to the end of the second step, when optimiser states and all
policies are there. Both without the weights that the generator came with.

NFT with a velocity KL to the reference, CM-GRPO's Gaussian surrogate on all stochastic steps, and the Gibbs surrogate
of routed branches; on the embedded network and on a mid-size random one, with LoRA and with all weights trained, in one
backward pass and in several. The planted error is an estimate of a network that keeps nothing for its backward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backbones.embedded.generator import CONFIG, ShapesGenerator
from benchmarks.measure import LiveBytes, Row
from benchmarks.p1 import METHODS, FreeReward
from benchmarks.scenarios import MIDDLE, random_generator
from framework.adapters import Adaptation, FullFineTuning, LoRA
from framework.advantages import GroupCentred
from framework.compatibility import check_recipe
from framework.data.scenes import ShapesCaptions
from framework.interfaces import ExplorationStrategy, Regularizer, SurrogatePolicy
from framework.memory_estimate import MIB, MemoryEstimate
from framework.optimization import AdamW, Constant
from framework.policies import Policies
from framework.run_shape import StepParts, estimate_step
from framework.trainer import Trainer
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.exploration.noise_endpoint import Last, NoiseEndpoint
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.gibbs_tve import GibbsTVE


@dataclass(frozen=True)
class Case:
    """A recipe whose memory is estimated and measured."""

    name: str
    config: Mapping[str, Any]
    exploration: ExplorationStrategy
    surrogate: SurrogatePolicy
    regularizer: Regularizer
    adaptation: Adaptation
    micro_batch_size: int
    prompts: int = 2


def cases(small: Mapping[str, Any] = CONFIG, large: Mapping[str, Any] = MIDDLE) -> list[Case]:
    """What the rows compare."""
    noise, behind = NoiseEndpoint(4, 3, 3, Last()), NoiseEndpoint(4, 8, 3, Last())
    routing = CausalHistoryRouting(4, routed_frames=3, routed_blocks=2, tail_blocks=1, stream_blocks=10)
    nft, gaussian = METHODS["NFT"].surrogate(), METHODS["CM-GRPO"].surrogate()
    return [
        Case("NFT, embedded, LoRA", small, noise, nft, VelocityKL(), LoRA(16), 8),
        Case("NFT, embedded, LoRA, micro-batches", small, noise, nft, VelocityKL(), LoRA(16), 4),
        Case("NFT, embedded, all weights", small, noise, nft, VelocityKL(), FullFineTuning(), 8),
        Case("CM-GRPO, embedded, LoRA", small, noise, gaussian, VelocityKL(), LoRA(16), 4),
        Case("KVPO, embedded, LoRA", small, routing, GibbsTVE(), NoRegularizer(), LoRA(16), 5),
        Case("NFT, mid-size, LoRA, behind a prefix", large, behind, nft, VelocityKL(), LoRA(16), 4, 1),
        Case("CM-GRPO, mid-size, all weights", large, noise, gaussian, VelocityKL(), FullFineTuning(), 2, 1),
    ]


def parts_of(case: Case, generator: ShapesGenerator) -> StepParts:
    """The case as the estimate reads it."""
    keep = check_recipe(case.exploration, case.surrogate, GroupCentred(), case.regularizer)
    return StepParts(
        generator, case.exploration, case.surrogate, case.regularizer, ShapesCaptions().scenes(), keep, 0,
        case.prompts, 1, case.micro_batch_size,
    )  # fmt: skip


def estimated(case: Case) -> tuple[int, MemoryEstimate]:
    """(estimated peak without the weights that the network came with, the estimate)."""
    generator = random_generator(case.config)
    came_with = sum(p.nbytes for p in generator.network.parameters())
    case.adaptation.attach(generator.network, 0)
    estimate = estimate_step(parts_of(case, generator), case.adaptation)
    assert estimate is not None, "the embedded generator knows its sizes"
    return estimate.peak - came_with, estimate


def measured(case: Case, steps: int = 2) -> int:
    """Peak of live bytes of a run of the case."""
    generator = random_generator(case.config)
    parts = parts_of(case, generator)
    with LiveBytes() as counter:
        policies = Policies(generator, case.adaptation, Constant(0.5), 0.9, seed=0)
        trainer = Trainer(
            generator=generator,
            exploration=case.exploration,
            surrogate=case.surrogate,
            reward=FreeReward(),
            advantage=GroupCentred(),
            regularizer=case.regularizer,
            policies=policies,
            optimizer=AdamW(),
            scenes=tuple(parts.scenes),
            keep=parts.keep,
            seed=0,
            prompts_per_step=case.prompts,
            updates_per_rollout=1,
            micro_batch_size=case.micro_batch_size,
        )
        for _ in range(steps):
            trainer.step()
    return counter.peak


def off(estimate: int, found: int) -> float:
    """How far the estimate is from what was found, either way, as a part of it."""
    return abs(estimate / found - 1)


def measure(small: Mapping[str, Any] = CONFIG, large: Mapping[str, Any] = MIDDLE) -> list[Row]:
    """Rows P6."""
    rows = []
    for number, case in enumerate(cases(small, large)):
        guess, estimate = estimated(case)
        found = measured(case)
        note = f"{guess / MIB:.1f} / {found / MIB:.1f} MiB, peak in the {estimate.worst}"
        measure = "how far the estimated bytes of a training step are from the measured ones"
        rows.append(Row("P6", f"{measure}, {case.name}", off(guess, found), 0.10, note=note))
        if number == 0:
            blind = guess - max(estimate.phases.values()) + estimate.phases["optimiser step"]
            what = f"{measure}, planted: nothing kept for the backward pass"
            rows.append(Row("P6", what, off(blind, found), 0.10, planted=True))
    return rows
