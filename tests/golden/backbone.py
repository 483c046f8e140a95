"""What all backbone cases share: the tiny network and its generator, block sizes, history policies, rollout, probes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.history import FullHistory, HistoryPolicy, SinkWindow
from backbones.plans import PackedBlock
from backbones.streaming import WanStream, WanStreamingGenerator
from backbones.wan.checkpoints import to_diffusers_keys
from backbones.wan.transformer import CausalWanTransformer3DModel
from framework.interfaces import GeneratorRecipe
from framework.kernels import Consistency
from framework.rollout import denoise_block
from framework.schedules import FewStepSchedule
from framework.types import Probes, Scene
from tests.golden.case import Case, Row, compare

TOLERANCE = {torch.float32: 3e-5, torch.float64: 5e-6}
"""Absolute, with a float64 time sinusoid."""
SIGMA_TOLERANCE = 5e-7
"""Of noise levels, and a thousandth of that of timesteps: the released tables are computed in float32."""

ROLLOUT_INPUTS = (
    "weights.*", "prompt_embeds", "noise", "renoise", "probe_x", "probe_history", "probe_timesteps"
)  # fmt: skip

Spans = Sequence[tuple[int, int]]
"""(first frame, past-the-last frame) of each block."""


class GoldenGenerator(WanStreamingGenerator):
    """A generator whose prompts are row numbers of the case's padded prompt embeddings."""

    def __init__(
        self,
        network: CausalWanTransformer3DModel,
        recipe: GeneratorRecipe,
        policy: HistoryPolicy,
        prompt_embeds: Tensor,
        spans: Spans,
    ) -> None:
        super().__init__(network, recipe, policy)
        self.prompt_embeds = prompt_embeds
        self.spans = spans

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(str(row) for row in range(len(self.prompt_embeds)))

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        return self.prompt_embeds[[int(prompt) for prompt in prompts]]

    def start(self, batch: int) -> WanStream:
        """A stream of ``batch`` clips; a lone prompt serves them all."""
        stream = self.open(self.prompts)
        return self.fork(stream, batch // len(self.prompts))

    def decode(self, latents: Tensor, prefix: Tensor | None = None) -> Tensor:
        return latents

    def _blocks(self, probes: Probes, streams: int) -> list[PackedBlock]:
        """The case's blocks, which may be of unequal length; blocks of equal length are the generator's own."""
        if len({stop - start for start, stop in self.spans}) == 1:
            return super()._blocks(probes, streams)
        frames = probes.clean.shape[2]
        offsets = [s * frames for s in range(streams)]
        return [PackedBlock(start, stop - start, offset + start) for offset in offsets for start, stop in self.spans]


def block_spans(case: Case, frames: int, count: str = "blocks", size: str = "frames_per_block") -> Spans:
    """The blocks of a clip: of one size, of listed sizes, or with a first one of another size.

    Raises ValueError where the sizes do not add up to the frames of the case.
    """
    blocks, length = case.hparam(count), case.hparam(size)
    lengths = length if isinstance(length, list) else [frames - (blocks - 1) * length, *[length] * (blocks - 1)]
    if len(lengths) != blocks or sum(lengths) != frames or min(lengths) < 1:
        raise ValueError(f"{case.name}: {blocks} blocks of {length} frames do not make a clip of {frames} frames")
    stops = list(accumulate(lengths))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def frame_policy(sink: int, window: int | None, relative: bool = False) -> HistoryPolicy:
    """The policy of a (sink, window) pair in frames; the window counts the sink and the current block."""
    return FullHistory() if window is None else SinkWindow(sink, window, relative)


def policy_names(case: Case, prefix: str) -> dict[str, tuple[int, int | None]]:
    """The tensors ``prefix.sinkS_windowW`` of a case and their (sink, window)."""
    found = {}
    for name in case.tensors:
        match = re.fullmatch(re.escape(prefix) + r"\.sink(\d+)_window(\d+|all)", name)
        if match:
            found[name] = (int(match[1]), None if match[2] == "all" else int(match[2]))
    return found


def policy_name(sink: int, window: int | None) -> str:
    """``sinkS_windowW``, W = all for no window."""
    return f"sink{sink}_window{'all' if window is None else window}"


def build_generator(
    case: Case, policy: HistoryPolicy, spans: Spans, schedule: FewStepSchedule, dtype: torch.dtype
) -> GoldenGenerator:
    """The case's network, with its weights, behind a policy."""
    model = case.hparam("model")
    network = CausalWanTransformer3DModel(
        num_attention_heads=model["num_heads"],
        attention_head_dim=model["dim"] // model["num_heads"],
        in_channels=model["in_dim"],
        out_channels=model["in_dim"],
        text_dim=model["text_dim"],
        freq_dim=model["freq_dim"],
        ffn_dim=model["ffn_dim"],
        num_layers=model["num_layers"],
    )
    network = network.double() if dtype == torch.float64 else network
    weights = {k.removeprefix("weights."): v for k, v in case.tensors.items() if k.startswith("weights.")}
    network.load_state_dict(to_diffusers_keys(weights), strict=True)
    height, width = case.hparam("latent_hw")
    recipe = GeneratorRecipe(
        case.name, spans[-1][1] - spans[-1][0], len(spans), (model["in_dim"], height, width), schedule
    )
    embeds = case["prompt_embeds"].to(dtype)
    embeds = F.pad(embeds, (0, 0, 0, model["text_len"] - embeds.shape[1]))
    return GoldenGenerator(network, recipe, policy, embeds, spans)


def few_step_schedule(case: Case) -> FewStepSchedule:
    """The sampler's grid by the project's rule; a case that does not mention the warp uses it."""
    warp = case.hparams.get("warp", True)
    return FewStepSchedule(tuple(case.hparam("nominal_steps")), case.hparam("timestep_shift"), warp)


@dataclass(frozen=True)
class AsTabulated(FewStepSchedule):
    """The project's grid with the rounding of the table that the case was computed with.

    A level that is off by 2e-8 moves a rollout by 5e-5, so agreement needs the rounded levels. A grid that is off by
    more than rounding is used as it is, and misses.
    """

    table: tuple[float, ...] = ()

    @property
    def sigmas(self) -> tuple[float, ...]:
        own = super().sigmas
        near = len(own) == len(self.table) and all(
            abs(a - b) <= SIGMA_TOLERANCE for a, b in zip(own, self.table, strict=True)
        )
        return self.table if near else own


def as_tabulated(case: Case, schedule: FewStepSchedule) -> FewStepSchedule:
    """A schedule with the rounding of the case's own timesteps."""
    return AsTabulated(**vars(schedule), table=tuple((case["timesteps"].double() / 1000).tolist()))


@dataclass(frozen=True)
class Rollout:
    """Every number of a rollout, [K, B, C, F, H, W] per step and [B, C, F, H, W] per clip."""

    velocity: Tensor
    x0: Tensor
    latents: Tensor
    clean_velocity: Tensor


@torch.no_grad()
def roll_out(case: Case, generator: GoldenGenerator, dtype: torch.dtype) -> Rollout:
    """Sample all blocks with the given noises; each clean pass commits what the next block sees."""
    draws = torch.cat([case["noise"][None], case["renoise"]]).transpose(0, 1).to(dtype)  # [B, 1 + draws, C, F, H, W]
    sigmas = generator.recipe.schedule.sigmas
    stream = generator.start(len(draws))
    parts: list[tuple[Tensor, ...]] = []
    for first, stop in generator.spans:
        trace = denoise_block(generator, stream, draws[:, :, :, first:stop], Consistency())
        steps = zip(trace.states[:-1], trace.velocities, sigmas, strict=True)
        x0 = [x - sigma * v for x, v, sigma in steps]
        clean = generator.predict(trace.x0, 0.0, stream)
        parts.append((torch.stack(trace.velocities), torch.stack(x0), trace.x0, clean))
        stream = generator.commit(trace.x0, stream)
    return Rollout(*(torch.cat(part, dim=-3) for part in zip(*parts, strict=True)))


@torch.no_grad()
def streamed_probe(case: Case, generator: GoldenGenerator, dtype: torch.dtype) -> Tensor:
    """Each block asked once, at its own timestep, behind a stream of the given clean blocks."""
    x, history = case["probe_x"].to(dtype), case["probe_history"].to(dtype)
    stream, velocities = generator.start(len(x)), []
    for (first, stop), timestep in zip(generator.spans, case["probe_timesteps"].tolist(), strict=True):
        velocities.append(generator.predict(x[:, :, first:stop], timestep / 1000, stream))
        stream = generator.commit(history[:, :, first:stop], stream)
    return torch.cat(velocities, dim=2)


@torch.no_grad()
def packed_probe(case: Case, generator: GoldenGenerator, dtype: torch.dtype) -> Tensor:
    """The same in one packed replay."""
    x = case["probe_x"].to(dtype)
    sigma = case["probe_timesteps"] / 1000
    probes = pack(generator, x, case["probe_history"].to(dtype), sigma.expand(len(x), -1), history_grad=False)
    return generator.replay(probes)[:, 0]


def pack(generator: GoldenGenerator, noisy: Tensor, clean: Tensor, sigma: Tensor, *, history_grad: bool) -> Probes:
    """Probes at one noisy version of a whole clip; sigma [B, blocks]."""
    per_frame = sigma.repeat_interleave(torch.tensor([stop - start for start, stop in generator.spans]), dim=1)
    return Probes(
        noisy=noisy.unsqueeze(1),
        sigma=per_frame.unsqueeze(1),
        clean=clean,
        start=0,
        prefix=None,
        scenes=tuple(map(Scene.single, generator.prompts)),
        rows=torch.arange(len(noisy)),
        history_grad=history_grad,
    )


def check_schedule(case: Case, schedule: FewStepSchedule) -> list[Row]:
    """The noise levels really used."""
    sigmas = torch.tensor(schedule.sigmas, dtype=torch.float64)
    return [
        compare(case, "sigmas", sigmas, SIGMA_TOLERANCE, "schedule"),
        compare(case, "timesteps", 1000 * sigmas, 1000 * SIGMA_TOLERANCE, "schedule"),
    ]


def check_rollout(case: Case, policy: HistoryPolicy, tensors: Sequence[str]) -> Iterator[Row]:
    """The named fields of a rollout, and of the schedule it follows."""
    if case.hparams.get("context_noise", 0) != 0:
        raise ValueError(f"{case.name}: context_noise={case.hparams['context_noise']} is not taken up, only 0 is")
    schedule = few_step_schedule(case)
    yield from check_schedule(case, schedule)
    spans = block_spans(case, case["noise"].shape[2])
    for dtype, tolerance in TOLERANCE.items():
        generator = build_generator(case, policy, spans, as_tabulated(case, schedule), dtype)
        rollout = roll_out(case, generator, dtype)
        for tensor in tensors:
            yield compare(case, tensor, getattr(rollout, tensor), tolerance, precision(dtype))


def check_probe(case: Case, tensor: str, policy: HistoryPolicy) -> Iterator[Row]:
    """One expected tensor of probes, through the cache and packed."""
    schedule = few_step_schedule(case)
    spans = block_spans(case, case["probe_x"].shape[2])
    for dtype, tolerance in TOLERANCE.items():
        generator = build_generator(case, policy, spans, schedule, dtype)
        for how, probe in (("streamed", streamed_probe), ("packed", packed_probe)):
            yield compare(case, tensor, probe(case, generator, dtype), tolerance, f"{precision(dtype)} {how}")


def precision(dtype: torch.dtype) -> str:
    """``float32`` or ``float64``."""
    return str(dtype).removeprefix("torch.")
