"""P7: how fast a Wan transformer streams and learns, and how many bytes it keeps of every frame.

Random weights: cost does not depend on their values. The text encoder and the video decoder are not part of it.

frames: pixel frames per second of a single stream whose window is full, 4 steps and a clean pass per block, four pixel
frames per latent frame. keys and values: what the history keeps alive per latent frame, over 2 · layers · S · width
numbers; a history of views into a larger tensor must miss it. memo: blocks behind rotated keys that are kept for the
steps of the block, over the same with a budget of no bytes. update: floating-point operations of a packed replay of a
clip and its backward pass, counted as three forward passes, per second; of the device's peak where that is known.

On a CPU a tiny network is measured, in core-seconds on one thread. The 1.3B shapes are measured on a GPU in bf16, where
there is one; without one the row says so.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.history import KVHistory, SinkWindow, kv_frame_bytes
from backbones.streaming import WanStreamingGenerator
from backbones.streams import WanStream
from backbones.wan.recipes import WAN_1_3B
from backbones.wan.transformer import CausalWanTransformer3DModel
from benchmarks.measure import Row, alternate
from framework.interfaces import GeneratorRecipe
from framework.kernels import Consistency
from framework.rng import draw_noise
from framework.rollout import denoise_block, noise_shape
from framework.schedules import FewStepSchedule
from framework.types import Probes, Scene

TINY = {
    "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4, "ffn_dim": 256, "text_dim": 32, "freq_dim": 64
}  # fmt: skip
POLICY = SinkWindow(sink=3, window=12)
BLOCK, STRIDE, TEXT_TOKENS = 3, 4, 512
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations per second by what a device's name holds, as its maker states them."""


class RandomTexts(WanStreamingGenerator):
    """A transformer whose prompts are random embeddings."""

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        weight = self.network.proj_out.weight
        random = torch.Generator().manual_seed(len(prompts))
        rows = torch.randn(len(prompts), TEXT_TOKENS, self.network.config["text_dim"], generator=random)
        return rows.to(weight)

    def decode(self, latents: Tensor, prefix: Tensor | None = None) -> Tensor:
        raise NotImplementedError("this benchmark shows nothing")


def wan_generator(
    config: Mapping[str, Any], latent: tuple[int, int, int], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> RandomTexts:
    """Random weights on a device, LongLive's window."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        network = CausalWanTransformer3DModel(**config)
    torch.nn.Module.to(network, dtype)  # diffusers' own warns
    recipe = GeneratorRecipe("random", BLOCK, 7, latent, FewStepSchedule(), temporal_stride=STRIDE)
    return RandomTexts(network, recipe, POLICY)


@torch.no_grad()
def full_stream(generator: RandomTexts) -> WanStream:
    """A stream of one clip whose window is full."""
    stream, shape = generator.open(["a"]), (1, *latent_shape(generator, BLOCK))
    for _ in range(POLICY.window // BLOCK + 1):
        stream = generator.commit(torch.randn(shape, device=device_of(generator)), stream)
    return stream


def latent_shape(generator: RandomTexts, frames: int) -> tuple[int, int, int, int]:
    """(C, F, H, W) of so many latent frames."""
    channels, height, width = generator.recipe.latent
    return channels, frames, height, width


def device_of(generator: RandomTexts) -> torch.device:
    """Where its network is."""
    return next(generator.network.parameters()).device


@torch.no_grad()
def advance(generator: RandomTexts, stream: WanStream, blocks: int) -> WanStream:
    """Generate so many blocks and throw them away."""
    kernel = Consistency()
    for block in range(blocks):
        noise = draw_noise([block], noise_shape(generator, kernel, 1), device_of(generator))
        stream = generator.commit(denoise_block(generator, stream, noise, kernel).x0, stream)
    return stream


def frame_bytes(history: KVHistory) -> float:
    """Measured bytes of keys and values per latent frame that is kept."""
    return history.nbytes / len(history.frame_ids)


def theory(generator: RandomTexts) -> int:
    """The bytes that the shapes ask for."""
    config, (_, height, width) = generator.network.config, generator.recipe.latent
    _, p_h, p_w = config["patch_size"]
    numbers = config["num_attention_heads"] * config["attention_head_dim"]
    itemsize = generator.network.proj_out.weight.dtype.itemsize
    return kv_frame_bytes(config["num_layers"], height // p_h * (width // p_w), numbers, itemsize)


def as_views(history: KVHistory) -> KVHistory:
    """The planted fault: every chunk is the first half of a tensor that nobody else holds."""

    def doubled(x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)[:, : x.shape[1]]

    chunks = (replace(c, kv=tuple((doubled(k), doubled(v)) for k, v in c.kv)) for c in history.chunks)
    return KVHistory(tuple(chunks), history.branches)


def clip_probes(generator: RandomTexts) -> Probes:
    """A clip at one noise level."""
    shape, device = latent_shape(generator, BLOCK * generator.recipe.clip_blocks), device_of(generator)
    clean, noisy = (torch.randn(1, *shape, device=device) for _ in range(2))
    sigma = torch.full((1, 1, shape[1]), 0.8, device=device)
    return Probes(noisy[:, None], sigma, clean, 0, None, (Scene.single("a"),), torch.arange(1))


def update(generator: RandomTexts, probes: Probes) -> None:
    """A packed replay and its backward pass."""
    generator.network.zero_grad(set_to_none=True)
    generator.replay(probes).square().mean().backward()


def replay_operations(config: Mapping[str, Any], latent: tuple[int, int, int]) -> int:
    """Floating-point operations of a replay's forward pass; counted where nothing is computed, with the kernel of the
    attention that the counter sees into on every device."""
    generator = wan_generator(config, latent, "meta")
    generator.attention = "math"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        generator.replay(clip_probes(generator))
    return counter.get_total_flops()


def rates(work: Callable[[], object], amount: float, repeats: int, now: Callable[[], float]) -> list[float]:
    """``amount`` per second of each of some calls, after one that is not measured."""
    work()
    found = []
    for _ in range(repeats):
        started = now()
        work()
        found.append(amount / (now() - started))
    return found


def rows_of(
    generator: RandomTexts, operations: int, what: str, blocks: int, repeats: int, now: Callable[[], float], second: str
) -> list[Row]:
    """The rows of one network on one device; operations: of an update."""
    stream = full_stream(generator)
    fps = rates(lambda: advance(generator, stream, blocks), blocks * BLOCK * STRIDE, repeats, now)
    measured, wanted = frame_bytes(stream.history), theory(generator)
    leaking = frame_bytes(as_views(stream.history))
    probes = clip_probes(generator)
    speed = rates(lambda: update(generator, probes), operations, repeats, now)
    device = device_of(generator)
    peak = next((p for n, p in PEAK.items() if device.type == "cuda" and n in torch.cuda.get_device_name(device)), None)
    share = "" if peak is None else f"; {statistics.median(speed) / peak:.0%} of {peak / 1e12:.0f} TFLOP/s"
    note = f"{measured / 2**20:.2f} / {wanted / 2**20:.2f} MiB per latent frame"
    gigas = [s / 1e9 for s in speed]
    return [
        Row("P7", f"streaming, {what}", statistics.median(fps), spread=(min(fps), max(fps)), unit=f"frames/{second}"),
        Row("P7", f"stored keys and values / what the shapes ask for, {what}", measured / wanted, 1.0, note=note),
        Row("P7", f"the same, planted: a history of views, {what}", leaking / wanted, 1.0, planted=True),
        Row(
            "P7", f"update, {what}", statistics.median(gigas), spread=(min(gigas), max(gigas)),
            unit=f"GFLOP/{second}", note=f"{operations / 1e9:.3g} GFLOP{share}",
        ),
    ]  # fmt: skip


def memo_row(config: Mapping[str, Any], latent: tuple[int, int, int], blocks: int, pairs: int) -> Row:
    """Rotated keys kept for a block, over rotated again at every step."""
    keeping, again = (wan_generator(config, latent) for _ in range(2))
    again.memo_bytes = 0
    streams = [full_stream(generator) for generator in (keeping, again)]
    ratio = alternate(lambda: advance(keeping, streams[0], blocks), lambda: advance(again, streams[1], blocks), pairs)
    return Row("P7", "rotated keys kept for a block / not kept", ratio.median, spread=ratio.spread, note=ratio.note)


def cuda_clock() -> float:
    """Seconds once everything asked of the GPU is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    config: Mapping[str, Any] = TINY, latent: tuple[int, int, int] = (16, 16, 16), blocks: int = 4, repeats: int = 5
) -> list[Row]:
    """Rows P7: the tiny network on this processor, and 1.3B shapes on a GPU where there is one."""
    tiny = wan_generator(config, latent)
    rows = rows_of(
        tiny, 3 * replay_operations(config, latent), "tiny network", blocks, repeats, time.process_time, "core-s"
    )
    rows.append(memo_row(config, latent, blocks, repeats))
    if not torch.cuda.is_available():
        return [*rows, Row("P7", "1.3B shapes in bf16", math.nan, note="no GPU: not measured")]
    shapes = (WAN_1_3B, (16, 60, 104))
    large = wan_generator(*shapes, "cuda", torch.bfloat16)
    large.network.enable_gradient_checkpointing()
    what = f"1.3B shapes in bf16 on {torch.cuda.get_device_name()}"
    rows += rows_of(large, 3 * replay_operations(*shapes), what, blocks, repeats, cuda_clock, "s")
    stored = torch.cuda.max_memory_allocated() / 2**30
    return [*rows, Row("P7", f"largest memory, {what}", stored, unit="GiB")]
