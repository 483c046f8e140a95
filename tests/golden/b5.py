"""Kind b5: RAVEN's packed interleaved forward, its velocities and its gradients with attached and detached history."""

from collections.abc import Iterator

import torch
from torch import Tensor

from backbones.history import FullHistory, HistoryPolicy, SinkWindow
from backbones.wan.checkpoints import diffusers_name
from framework.schedules import FewStepSchedule
from tests.golden.backbone import (
    GoldenGenerator,
    Spans,
    block_spans,
    build_generator,
    pack,
    policy_name,
    precision,
)
from tests.golden.case import Case, Row, compare, relative_norm

INPUTS: tuple[str, ...] = ("weights.*", "prompt_embeds", "noisy", "clean", "cotangent", "timesteps")
NOT_TAKEN_UP: tuple[str, ...] = ()
OUTPUT_TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-6}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}


def chunk_policy(sink: int, window: int | None, spans: Spans) -> HistoryPolicy:
    """A policy in chunks, whose window excludes the current chunk, as a policy in frames, whose window includes it.

    Chunk i sees the chunks j < i with j < sink or i − j ≤ window. Raises ValueError where chunks of unequal length
    make that a set that no frame window describes.
    """
    if window is None:
        return FullHistory()
    sink_frames = spans[min(sink, len(spans)) - 1][1] if sink else 0
    longest = max(stop - start for start, stop in spans[1:] or spans)
    policy = SinkWindow(sink_frames, sink_frames + (window + 1) * longest)
    for i, (start, stop) in enumerate(spans):
        wanted = [f for j, (a, b) in enumerate(spans[:i]) if j < sink or i - j <= window for f in range(a, b)]
        if list(policy.visible(start, stop - start)) != wanted:
            raise ValueError(f"sink={sink}, window={window} in chunks {spans} is no window in frames")
    return policy


def check(case: Case) -> list[Row]:
    """All policies, in both precisions."""
    spans = block_spans(case, case["clean"].shape[2], "chunks", "frames_per_chunk")
    return [
        row
        for sink, window in case.hparam("policies_sink_window_in_chunks")
        for dtype in OUTPUT_TOLERANCE
        for row in check_policy(case, policy_name(sink, window), chunk_policy(sink, window, spans), spans, dtype)
    ]


def check_policy(case: Case, name: str, policy: HistoryPolicy, spans: Spans, dtype: torch.dtype) -> Iterator[Row]:
    """Velocities, streamed and packed, and the gradients of Σ cotangent · velocity through either kind of history."""
    generator = build_generator(case, policy, spans, FewStepSchedule(), dtype)
    sigma = clip_sigma(case, len(spans))
    streamed = stream(case, generator, sigma, dtype)
    yield compare(case, f"velocity.{name}", streamed, OUTPUT_TOLERANCE[dtype], f"{precision(dtype)} streamed")
    weights = dict(generator.network.named_parameters())
    asked = {original: weights[str(diffusers_name(original))] for original in case.hparam("gradient_weights")}
    for prefix, history_grad in (("grad", True), ("grad_detached_history", False)):
        how = f"{precision(dtype)} packed, {'attached' if history_grad else 'detached'}"
        probes = pack(generator, case["noisy"].to(dtype), case["clean"].to(dtype), sigma, history_grad=history_grad)
        velocity = generator.replay(probes)[:, 0]
        yield compare(case, f"velocity.{name}", velocity, OUTPUT_TOLERANCE[dtype], how)
        loss = (case["cotangent"].to(dtype) * velocity).sum()
        for original, gradient in zip(asked, torch.autograd.grad(loss, list(asked.values())), strict=True):
            tensor = f"{prefix}.{name}.{original}"
            yield compare(case, tensor, gradient, GRADIENT_TOLERANCE[dtype], how, relative_norm)


def clip_sigma(case: Case, chunks: int) -> Tensor:
    """Noise level of every clip and chunk [B, chunks]; all chunks of a clip share one timestep."""
    return (case["timesteps"].double() / 1000).unsqueeze(1).expand(-1, chunks)


@torch.no_grad()
def stream(case: Case, generator: GoldenGenerator, sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """The noisy chunks one by one behind a KV cache of the clean ones."""
    noisy, clean = case["noisy"].to(dtype), case["clean"].to(dtype)
    state, velocities = generator.start(len(noisy)), []
    for first, stop in generator.spans:
        rows = [generator.predict(noisy[:, :, first:stop], level, state) for level in sigma[:, 0].tolist()]
        velocities.append(torch.stack([row[clip] for clip, row in enumerate(rows)]))
        state = generator.commit(clean[:, :, first:stop], state)
    return torch.cat(velocities, dim=2)
