"""P1: what a training step costs beyond its network passes.

a: `Trainer.step` with LoRA on every linear layer, a velocity KL to the reference, and a reward that costs nothing: NFT
with a lagging behaviour policy, which asks for most views; CM-GRPO's Gaussian surrogate on all stochastic steps; and
KVPO, routed at all steps behind a prefix, with its anchor and a velocity KL on it.
b: the network calls that one such step made, on the same tensors and in the same gradient mode, in a plain loop: text
K/V, sampler calls and commits of the rollout, clean and noisy passes of each view, and the backward pass from the same
cotangents.
What remains is overhead: plans, noise, sampler arithmetic, history, policy switching, objective, optimiser, averages.

The network's share is timed inside a whole step that also scores with the ground-truth reward: core-seconds spent in
forward calls, text K/V and backward passes over those of the step.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from backbones.embedded.generator import ShapesGenerator
from backbones.wan.transformer import CausalWanTransformer3DModel, TextKV
from benchmarks.measure import Row, alternate, clock
from benchmarks.scenarios import MIDDLE, random_generator
from framework.adapters import LoRA
from framework.advantages import GroupCentred
from framework.anchored_advantages import AnchorCentred
from framework.compatibility import check_recipe
from framework.data.scenes import ShapesCaptions
from framework.distributed import World
from framework.interfaces import AdvantageRule, ExplorationStrategy, Regularizer, RewardModel, SurrogatePolicy
from framework.optimization import AdamW, Constant
from framework.policies import Policies
from framework.trainer import Trainer
from framework.types import Scores, VideoBatch
from rewards.shapes import ShapesReward
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.exploration.noise_endpoint import Last, NoiseEndpoint
from strategies.regularizers.anchor_velocity import AnchorVelocityKL
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.gaussian_kernel import GaussianReinforce
from strategies.surrogates.gibbs_tve import GibbsTVE
from strategies.surrogates.nft import NFT
from strategies.surrogates.transitions import AllSteps, TrainedSteps


class FreeReward(RewardModel):
    """A reward that is different for every clip of a batch and costs nothing."""

    @property
    def signals(self) -> tuple[str, ...]:
        return ("order",)

    def score(self, videos: VideoBatch) -> Scores:
        return Scores.of({"order": -torch.arange(len(videos), dtype=torch.float32)})  # an anchor is last and worst


@dataclass
class NetworkCall:
    """One forward call as it happened. text: which text call its `TextKV` came from."""

    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    text: int
    graph: bool
    cotangent: Tensor | None = None


@dataclass
class Recording:
    """The network calls of a step in order, and the text embeddings that were projected."""

    calls: list[NetworkCall] = field(default_factory=list)
    texts: list[tuple[Tensor, bool]] = field(default_factory=list)  # with the gradient mode

    def repeat(self, network: CausalWanTransformer3DModel) -> None:
        """The same passes in a plain loop."""
        texts: dict[int, TextKV] = {}
        for call in self.calls:
            if call.text not in texts:
                embedding, graph = self.texts[call.text]
                with torch.set_grad_enabled(graph):
                    texts[call.text] = network.text_kv(embedding)
            with torch.set_grad_enabled(call.graph):
                output, _ = network(*call.arguments, texts[call.text], **call.options)
            if call.cotangent is not None:
                output.backward(call.cotangent)
        network.zero_grad(set_to_none=True)


def record_step(trainer: Trainer, network: CausalWanTransformer3DModel) -> Recording:
    """Run one step and keep what went into the network."""
    recording, sources = Recording(), {}
    project = network.text_kv

    def recording_text(embedding: Tensor) -> TextKV:
        text = project(embedding)
        sources[id(text)] = (len(recording.texts), text)  # the text is held, so that its id stays its own
        recording.texts.append((embedding, torch.is_grad_enabled()))
        return text

    def before(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        x, timestep, text = arguments
        past = options["past"]
        attached = past is not None and len(past) > 0 and past.read(0)[0].requires_grad
        assert not attached, "a past that carries a graph cannot be repeated without the call that made it"
        recording.calls.append(NetworkCall((x, timestep), options, sources[id(text)][0], torch.is_grad_enabled()))

    def after(module: torch.nn.Module, arguments: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        if output[0].requires_grad:
            call = recording.calls[-1]
            output[0].register_hook(lambda gradient: setattr(call, "cotangent", gradient))

    hooks = [network.register_forward_pre_hook(before, with_kwargs=True), network.register_forward_hook(after)]
    try:
        with patch.object(network, "text_kv", recording_text):
            trainer.step()
    finally:
        for hook in hooks:
            hook.remove()
    return recording


def network_share(trainer: Trainer, network: CausalWanTransformer3DModel) -> float:
    """Core-seconds of one step that are spent in the network, as a share of all."""
    inside: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            result = function(*arguments, **options)
            inside.append(time.process_time() - started)
            return result

        return run

    with ExitStack() as stack:
        for owner, name in ((network, "forward"), (network, "text_kv"), (Tensor, "backward")):
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        whole = clock(trainer.step).core
    return sum(inside) / whole


@dataclass(frozen=True)
class Method:
    """The parts that make a method. exploration: of a group size and a number of blocks."""

    surrogate: Callable[[], SurrogatePolicy]
    exploration: Callable[[int, int], ExplorationStrategy] = lambda group, blocks: NoiseEndpoint(
        group, blocks, blocks, Last()
    )
    rule: Callable[[], AdvantageRule] = GroupCentred
    regularizer: Callable[[], Regularizer] = VelocityKL


METHODS: Mapping[str, Method] = {
    "NFT": Method(lambda: NFT(level_weights=(0, 1, 1, 1))),
    "CM-GRPO": Method(lambda: GaussianReinforce(TrainedSteps(AllSteps()))),
    "KVPO": Method(
        GibbsTVE,
        lambda group, blocks: CausalHistoryRouting(
            group,
            routed_frames=3,
            routed_blocks=blocks - 1,
            tail_blocks=1,
            stream_blocks=PREFIX + blocks,
            steps=(True,) * 4,
        ),
        AnchorCentred,
        AnchorVelocityKL,
    ),
}
PREFIX = 4
"""Blocks before the routed window: sink, recent frames and a pool of twice the route."""


def build_trainer(
    generator: ShapesGenerator,
    prompts: int,
    group: int,
    blocks: int,
    stream_blocks: int | None = None,
    method: Method = METHODS["NFT"],
    world: World | None = None,
) -> Trainer:
    """A trainer whose every view costs a pass once its first step is done; its window ends the stream."""
    exploration = method.exploration(group, blocks)
    if stream_blocks is not None:
        exploration = NoiseEndpoint(group, stream_blocks, blocks, Last())
    surrogate, regularizer, rule = method.surrogate(), method.regularizer(), method.rule()
    policies = Policies(generator, LoRA(), Constant(0.5), 0.9, seed=0)
    trainer = Trainer(
        generator=generator,
        exploration=exploration,
        surrogate=surrogate,
        reward=FreeReward(),
        advantage=rule,
        regularizer=regularizer,
        policies=policies,
        optimizer=AdamW(),
        scenes=ShapesCaptions().scenes(),
        keep=check_recipe(exploration, surrogate, rule, regularizer),
        seed=0,
        prompts_per_step=prompts,
        updates_per_rollout=1,
        micro_batch_size=prompts * (group + 1),  # with their anchors, where there are some
        world=world or World(),
    )
    trainer.step()  # from here on current, behaviour and reference differ
    return trainer


def measure(
    config: Mapping[str, Any] = MIDDLE, prompts: int = 1, group: int = 4, blocks: int = 3, pairs: int = 15
) -> list[Row]:
    """Rows P1."""
    rows = []
    for name, method in METHODS.items():
        generator = random_generator(config)
        trainer = build_trainer(generator, prompts, group, blocks, method=method)
        recording = record_step(trainer, generator.network)
        ratio = alternate(trainer.step, lambda r=recording, g=generator: r.repeat(g.network), pairs)
        trainer.reward = ShapesReward()
        share = network_share(trainer, generator.network)
        note = f"{len(recording.calls)} calls, {ratio.note}; the network's share of a step with reward is {share:.0%}"
        measure = f"training step ({name}) / its bare network passes"
        rows.append(Row("P1", measure, ratio.median, 1.05, ratio.spread, note=note))
    return rows
