"""A streaming generator around the causal transformer: text, history, prediction type; packed replay in two passes.

Packed replay evaluates the sequence C_0 C_1 … | N_0 N_1 … (RAVEN's interleaved sequence, in another order, which
attention does not see). The clean half runs first and hands its keys and values to the noisy half, so detaching the
history is one ``no_grad`` and saves the backward pass through it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbones.history import HistoryPolicy, KVHistory, VisibleKV
from backbones.plans import PackedBlock, packed_plan, streaming_plan
from backbones.wan.transformer import CausalWanTransformer3DModel, TextKV, wide_dtype
from framework.flow import expand_sigma, velocity_from_x0
from framework.interfaces import GeneratorRecipe, StreamingGenerator
from framework.types import Probes


@dataclass(frozen=True)
class WanStream:
    """The state of N clips: their committed K/V, their text K/V, and what the next block sees."""

    history: KVHistory
    text: TextKV
    batch: int
    view: VisibleKV | None = None
    """Memo of the visible past for the next block; all its denoising steps read the same rotated keys."""

    @property
    def next_frame(self) -> int:
        return self.history.next_frame


class WanStreamingGenerator(StreamingGenerator[WanStream]):
    """The causal Wan transformer as a `StreamingGenerator`.

    network: the transformer. policy: which history a block sees; the same object serves rollout, replay and export.
    """

    def __init__(self, network: CausalWanTransformer3DModel, recipe: GeneratorRecipe, policy: HistoryPolicy) -> None:
        self.network: CausalWanTransformer3DModel = network  # pyright: ignore[reportIncompatibleVariableOverride]
        self.recipe = recipe
        self.policy = policy

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Padded text embeddings [P, L, text_dim]; rows after the prompt's length are zero."""

    def open(self, prompts: Sequence[str]) -> WanStream:
        return WanStream(KVHistory(), self.network.text_kv(self.encode_text(prompts)), len(prompts))

    def fork(self, stream: WanStream, branches: int) -> WanStream:
        return WanStream(stream.history.fork(branches), stream.text, stream.batch * branches)

    def predict(self, x: Tensor, sigma: float, stream: WanStream) -> Tensor:
        visible, plan = streaming_plan(self.policy, stream.next_frame, x.shape[2])
        if stream.view is None or stream.view.frames != visible:
            object.__setattr__(stream, "view", stream.history.view(visible))  # a memo, not state
        timestep = torch.full((x.shape[0],), 1000 * sigma, dtype=wide_dtype(x), device=x.device)
        output, _ = self.network(x, timestep, stream.text, plan=plan, past=stream.view)
        return self._velocity(output.to(x.dtype), x, torch.full((), sigma, dtype=x.dtype, device=x.device))

    def commit(self, x0: Tensor, stream: WanStream) -> WanStream:
        visible, plan = streaming_plan(self.policy, stream.next_frame, x0.shape[2])
        view = stream.view if stream.view is not None and stream.view.frames == visible else None
        past = view or stream.history.view(visible)
        timestep = torch.zeros(x0.shape[0], dtype=wide_dtype(x0), device=x0.device)
        _, kv = self.network(x0, timestep, stream.text, plan=plan, past=past, return_kv=True)
        return replace(stream, history=stream.history.commit(kv, self.policy), view=None)

    def replay(self, probes: Probes) -> Tensor:
        stream = self._replay_prefix(probes)
        if stream.next_frame != probes.start:
            raise ValueError(
                f"Probes.start={probes.start} but Probes.prefix holds {stream.next_frame} frames: "
                "give the whole clean past of the window"
            )
        branches = len(probes) // len(probes.prompts)
        stream = self.fork(stream, branches) if branches > 1 else stream
        with nullcontext() if probes.history_grad else torch.no_grad():
            history = self._encode_clean(probes, stream)
        return self._predict_noisy(probes, history, stream.text)

    def _replay_prefix(self, probes: Probes) -> WanStream:
        """Re-roll the shared prefix from frame 0 with clean passes, once per group, with constant memory.

        From the second layer on, K/V depend on frames that have left the window, so encoding only the visible frames
        would be another conditional.
        """
        stream = self.open(probes.prompts)  # under the policy in force: text adapters train
        if probes.prefix is not None:
            with torch.no_grad():
                for block in probes.prefix.split(self.recipe.block_frames, dim=2):
                    stream = self.commit(block, stream)
        return stream

    def _blocks(self, probes: Probes, streams: int) -> list[PackedBlock]:
        """The blocks of ``streams`` versions of the window, side by side."""
        size, frames = self.recipe.block_frames, probes.clean.shape[2]
        return [
            PackedBlock(probes.start + f, min(size, frames - f), s * frames + f)
            for s in range(streams)
            for f in range(0, frames, size)
        ]

    def _encode_clean(self, probes: Probes, stream: WanStream) -> KVHistory:
        """Commit the window's clean blocks in one causal pass; nobody sees the last block, so it is left out."""
        blocks = self._blocks(probes, 1)[:-1]
        if not blocks:
            return stream.history
        past = stream.history.frame_ids
        plan = packed_plan(self.policy, past, blocks, causal=True)
        clean = probes.clean[:, :, : plan.frames]
        timestep = torch.zeros(clean.shape[0], dtype=wide_dtype(clean), device=clean.device)
        view = stream.history.view(past) if past else None
        _, kv = self.network(clean, timestep, stream.text, plan=plan, past=view, return_kv=True)
        return stream.history.commit(kv)

    def _predict_noisy(self, probes: Probes, history: KVHistory, text: TextKV) -> Tensor:
        past = history.frame_ids
        streams = probes.noisy.shape[1]
        plan = packed_plan(self.policy, past, self._blocks(probes, streams), causal=False)
        x = probes.noisy.transpose(1, 2).flatten(2, 3)  # [N, C, S·F, H, W]
        sigma = probes.sigma.flatten(1)
        view = history.view(past) if past else None
        widest = torch.promote_types(sigma.dtype, wide_dtype(x))  # a float64 σ is rounded once, as timestep
        timestep = (1000 * sigma.to(widest)).to(wide_dtype(x))
        output, _ = self.network(x, timestep, text, plan=plan, past=view)
        velocity = self._velocity(output.to(x.dtype), x, expand_sigma(sigma.to(x.dtype)))
        return velocity.unflatten(2, (streams, -1)).transpose(1, 2)

    def _velocity(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return output if self.recipe.prediction == "velocity" else velocity_from_x0(x, output, sigma)
