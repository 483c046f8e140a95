"""A streaming generator around the causal transformer: text, history, prediction type; packed replay in two passes.

Packed replay evaluates the sequence C_0 C_1 … | N_0 N_1 … (RAVEN's interleaved sequence, in another order, which
attention does not see). The clean half runs first and hands its keys and values to the noisy half, so detaching the
history is one ``no_grad`` and saves the backward pass through it.
"""

import sys
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backbones.history import HistoryPolicy, KVHistory, runs_of
from backbones.plans import PackedBlock, block_plan, causal_plan, packed_plan, streaming_plan
from backbones.recache import CleanPass, CleanPast, JointRecache, NoRecache, Recache
from backbones.recompute import as_stored, latents_of, made_anew
from backbones.rope import rope_table, rotate
from backbones.streams import Visit, WanStream, in_row_order, replaced_text, rows_of_memory, rows_of_text
from backbones.visible import LayerKV, VisibleKV
from backbones.wan.transformer import ATTENTION, THETA, CausalWanTransformer3DModel, TextKV, wide_dtype
from framework.flow import expand_sigma, velocity_from_x0
from framework.interfaces import GeneratorRecipe, StreamingGenerator
from framework.memory_estimate import NetworkDimensions
from framework.precision import AsWeights, Precision
from framework.types import GroupPlan, Probes, Visible


class WanStreamingGenerator(StreamingGenerator[WanStream]):
    """The causal Wan transformer as a `StreamingGenerator`.

    network: the transformer. policy: which history a block sees; the same object serves rollout, replay and export.
    recache: what a prompt switch does to the stored past, by default LongLive's (nothing if it is encoded anew).
    precision: of the network's calls. attention: kernel of the attention, a name of `ATTENTION`. memo_bytes: budget for
    the rotated keys that are kept for the steps of a block, None for all; it changes no value.
    """

    forward_methods = ("text_kv",)

    def __init__(
        self,
        network: CausalWanTransformer3DModel,
        recipe: GeneratorRecipe,
        policy: HistoryPolicy,
        recache: Recache | None = None,
        precision: Precision | None = None,
        attention: str = "auto",
        memo_bytes: int | None = None,
    ) -> None:
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
        if memo_bytes is not None and memo_bytes < 0:
            raise ValueError(f"memo_bytes must be at least 0, or None for no limit, got {memo_bytes}")
        if policy.recomputes and not isinstance(recache or NoRecache(), NoRecache):
            raise ValueError(
                f"{type(policy).__name__} encodes the past anew for every block, there is nothing to recache: leave "
                f"recache out or set it to NoRecache(), not {type(recache).__name__}()"
            )
        self.network: CausalWanTransformer3DModel = network  # pyright: ignore[reportIncompatibleVariableOverride]
        self.recipe = recipe
        self.policy = policy
        self.recache = recache or (NoRecache() if policy.recomputes else JointRecache())
        self.precision = precision or AsWeights()
        self.attention = attention
        self.memo_bytes = memo_bytes

    def _ask(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, tuple[LayerKV, ...]]:
        """One call of the network, in its precision."""
        with self.precision.around(x.device):
            return self.network(x, *arguments, attention=self.attention, **options)

    def _text(self, embeddings: Tensor) -> TextKV:
        """Text K/V, in the network's precision."""
        with self.precision.around(embeddings.device):
            return self.network.text_kv(embeddings)

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Padded text embeddings [P, L, text_dim]; rows after the prompt's length are zero."""

    def open(self, prompts: Sequence[str], resident: int = 0, switches: bool = False) -> WanStream:
        text = self._text(self.encode_text(prompts))
        clean = CleanPast() if switches else None
        return WanStream(KVHistory(), text, len(prompts), self.policy, resident, clean, self.policy.memory())

    def fork(self, stream: WanStream, branches: int) -> WanStream:
        history, clean = stream.history.fork(branches), stream.clean and stream.clean.fork(branches)
        return replace(stream, history=history, batch=stream.batch * branches, clean=clean, memo={})

    def switch(self, stream: WanStream, prompts: Sequence[str | None]) -> WanStream:
        """Raises ValueError for another number of prompts than the stream has, for a stream that was not opened with
        ``switches``, and where the recache moves the sink of some clips only."""
        start, count = stream.next_frame, stream.text.prompts
        if len(prompts) != count or stream.clean is None:
            raise ValueError(
                f"a switch takes one prompt (or None) for each of the {count} of a stream that was opened with "
                f"switches=True; got {len(prompts)} for a stream with switches={stream.clean is not None}"
            )
        owners = [i for i, prompt in enumerate(prompts) if prompt is not None]
        policy = self.recache.moved(stream.policy, start)
        if len(owners) < count and policy != stream.policy:
            raise ValueError(
                f"{type(self.recache).__name__} moves the sink, but only {len(owners)} of {count} prompts switch at "
                f"frame {start}; let all scenes of a rollout switch together, or set recache=JointRecache()"
            )
        text = self._text(self.encode_text([prompt for prompt in prompts if prompt is not None]))
        each = stream.batch // count
        rows = None if len(owners) == count else [each * owner + i for owner in owners for i in range(each)]
        history = stream.history
        memory = () if stream.memory is None else stream.memory.as_stored().kv
        with torch.no_grad():
            for part in self.recache.passes(stream.policy, start, self.recipe.block_frames) if start else ():
                _, kv = self._reencode(part, history, stream.clean, text, rows, memory)
                for run in runs_of(part.stored):
                    first = part.frames.index(run.start)
                    kept = slice(first, first + len(run))
                    history = history.rewrite(run.start, [(k[:, kept], v[:, kept]) for k, v in kv], rows)
        text = text if rows is None else replaced_text(stream.text, owners, text)
        remembered = stream.memory and stream.memory.switched(rows, stream.batch)
        return replace(stream, history=history, text=text, policy=policy, memory=remembered, memo={})

    def check_plan(self, plan: GroupPlan) -> None:
        """Raises ValueError for routes with a longer sink than the history policy keeps, and behind a sink that moves.

        The first frames of a stream are the policy's to keep: those that it drops once the window has rolled are gone,
        and a route that names them would find them in the first steps of a run and not in a later one.
        """
        sink = max((branch.route.sink for branch in plan.branches if branch.route is not None), default=None)
        if sink is None:
            return
        kept = next((frame for frame in range(sink) if not self.policy.retains(frame, sys.maxsize)), sink)
        if kept < sink:
            raise ValueError(
                f"CausalHistoryRouting.sink={sink}: routes would show the first {sink} frames of a stream, but "
                f"{type(self.policy).__name__} keeps {kept} of them; set sink to at most {kept}"
            )
        first, size = plan.first_block * self.recipe.block_frames, self.recipe.block_frames
        for start in (segment.start for segment in plan.scene.on_blocks(size).segments[1:]):
            if start <= first and self.recache.moved(self.policy, start) != self.policy:
                raise ValueError(f"{self._moved_sink()} (the prompt switches at frame {start})")

    def _moved_sink(self) -> str:
        return (
            f"{type(self.recache).__name__} moved the sink that routes name; set recache=JointRecache() to explore by "
            f"routing across prompt switches"
        )

    def _reencode(
        self,
        part: CleanPass,
        history: KVHistory,
        clean: CleanPast,
        text: TextKV,
        rows: Sequence[int] | None,
        memory: tuple[LayerKV, ...] = (),
    ) -> tuple[Tensor, Sequence[LayerKV]]:
        """(output, K/V per layer) of a clean pass over some rows, None for all, under their new text."""
        x = clean.read(part.frames)
        x = x if rows is None else x[torch.tensor(rows, device=x.device)]
        batch = clean.batch
        past = None
        if part.past or memory:
            past = history.view(part.past) if rows is None else history.route([part.past] * len(rows), rows, batch)
            past = replace(past, memory=rows_of_memory(memory, rows, batch), batch=len(x))
        return self._ask(x, self._timesteps(x, 0.0), text, plan=part.plan, past=past, return_kv=True)

    def predict(self, x: Tensor, sigma: float, stream: WanStream, visible: Visible | None = None) -> Tensor:
        outputs = []
        visits = self._visits(stream, x, visible)
        for visit in visits:
            part = visit.of(x)
            time = self._timesteps(part, 1000 * sigma)
            outputs.append(self._ask(part, time, visit.text, plan=visit.plan, past=visit.past)[0])
        output = in_row_order(visits, outputs).to(x.dtype)
        return self._velocity(output, x, torch.full((), sigma, dtype=x.dtype, device=x.device))

    def commit(self, x0: Tensor, stream: WanStream, visible: Visible | None = None) -> WanStream:
        if stream.policy.recomputes:
            history = stream.history.commit(as_stored(x0), stream.policy, stream.resident)
            return replace(stream, history=history, memo={})
        written = []
        visits = self._visits(stream, x0, visible)
        for visit in visits:
            part = visit.of(x0)
            time = self._timesteps(part, 0.0)
            _, kv = self._ask(part, time, visit.text, plan=visit.plan, past=visit.past, return_kv=True)
            written.append(kv)
        kv = [
            (in_row_order(visits, [k for k, _ in layer]), in_row_order(visits, [v for _, v in layer]))
            for layer in zip(*written, strict=True)
        ]
        memory = stream.recalled()
        if memory is not None:
            memory = memory.record(kv, stream.next_frame, partial(self._rotated, shape=x0.shape[3:]))
        history, clean = stream.history.commit(kv, stream.policy, stream.resident), stream.clean
        if clean is not None:
            needed = partial(self.recache.reads, stream.policy, start=history.next_frame)
            clean = clean.append(stream.next_frame, x0, needed)
        return replace(stream, history=history, clean=clean, memory=memory, memo={})

    def _rotated(self, k: Tensor, frame: int, shape: Sequence[int]) -> Tensor:
        """Keys [N, 1, S, heads, d] of a frame of latents of (height, width) ``shape``, rotated to its id."""
        _, p_h, p_w = self.network.config["patch_size"]
        height, width = shape
        table = rope_table((frame,), height // p_h, width // p_w, k.shape[-1], THETA, wide_dtype(k), k.device)
        return rotate(k, table)

    @staticmethod
    def _timesteps(x: Tensor, timestep: float) -> Tensor:
        return torch.full((x.shape[0],), timestep, dtype=wide_dtype(x), device=x.device)

    def _visits(self, stream: WanStream, x: Tensor, visible: Visible | None) -> tuple[Visit, ...]:
        """What each part of the batch sees of the past; one part per number of visible frames."""
        key = (x.shape[2], None if visible is None else tuple(visible))
        key = key if stream.memory is None else (*key, torch.is_grad_enabled())
        if key not in stream.memo:
            stream.memo[key] = self._plan_visits(stream, x.shape[2], visible, x.device)
        return stream.memo[key]

    def _plan_visits(
        self, stream: WanStream, length: int, visible: Visible | None, device: torch.device
    ) -> tuple[Visit, ...]:
        policy = stream.policy
        canonical, plan = streaming_plan(policy, stream.next_frame, length)
        memory = stream.recalled()
        shown = () if memory is None else memory.kv
        if visible is None or all(frames is None for frames in visible):
            past = self._shown(stream.history.view(canonical), stream.text, policy)
            past = replace(past, memory=shown, batch=stream.batch, budget=self.memo_bytes)
            return (Visit(None, plan, past, stream.text),)
        if policy != self.policy:
            raise ValueError(self._moved_sink())
        if len(visible) != stream.batch:
            raise ValueError(f"visible gives frames for {len(visible)} clips, the stream holds {stream.batch}")
        seen = [canonical if frames is None else frames for frames in visible]
        visits = []
        counts = sorted({len(frames) for frames in seen})
        budget = None if self.memo_bytes is None else self.memo_bytes // len(counts)
        for count in counts:
            rows = [row for row, frames in enumerate(seen) if len(frames) == count]
            frames = [seen[row] for row in rows]
            placed = [policy.positions(f, stream.next_frame, length) for f in frames]
            index = None if len(rows) == stream.batch else torch.tensor(rows, device=device)
            text = stream.text if index is None else rows_of_text(stream.text, rows, stream.batch)
            past = stream.history.route(frames, rows, stream.batch)
            remembered = rows_of_memory(shown, past.rows, stream.batch)
            past = replace(self._shown(past, text, policy), memory=remembered, batch=len(rows), budget=budget)
            if len({keys for keys, _ in placed}) > 1:
                past.positions = tuple(keys for keys, _ in placed)
            visits.append(Visit(index, block_plan(*placed[0]), past, text))
        return tuple(visits)

    def _shown(self, past: VisibleKV, text: TextKV, policy: HistoryPolicy, grad: bool = False) -> VisibleKV:
        """What a block reads of the past: the stored keys and values, or such that are made of the clean latents now.

        grad: whether gradient reaches the network through the latter.
        """
        if not policy.recomputes or not len(past):
            return past
        x, branches = latents_of(past)
        plan = causal_plan(tuple(range(len(past))), self.recipe.block_frames)
        with nullcontext() if grad else torch.no_grad():
            _, kv = self._ask(x, self._timesteps(x, 0.0), text, plan=plan, return_kv=True)
        return replace(made_anew(past, kv, branches), offsets=policy.logit_offsets(len(past)))

    def replay(self, probes: Probes) -> Tensor:
        stream = self._replay_prefix(probes)
        if stream.next_frame != probes.start:
            raise ValueError(
                f"Probes.start={probes.start} but Probes.prefix holds {stream.next_frame} frames: "
                "give the whole clean past of the window"
            )
        branches = len(probes) // len(probes.prompts)
        stream = self.fork(stream, branches) if branches > 1 else stream
        if stream.memory is not None or stream.policy.recomputes:
            return self._replay_in_turn(probes, stream)
        with nullcontext() if probes.history_grad else torch.no_grad():
            history = self._encode_clean(probes, stream)
        return self._predict_noisy(probes, replace(stream, history=history))

    def _replay_in_turn(self, probes: Probes, stream: WanStream) -> Tensor:
        """Block by block: what a memory shows to a block, and what is encoded anew, is known only once the block before
        it is committed."""
        velocities = []
        blocks = self._blocks(probes, 1)
        for i, block in enumerate(blocks):
            part = slice(block.offset, block.offset + block.length)
            noisy, clean = probes.noisy[:, :, :, part], probes.clean[:, :, part]
            now = replace(probes, noisy=noisy, sigma=probes.sigma[:, :, part], clean=clean, start=block.start)
            velocities.append(self._predict_noisy(now, stream))
            if i < len(blocks) - 1:
                with nullcontext() if probes.history_grad else torch.no_grad():
                    stream = self.commit(clean, stream)
        return torch.cat(velocities, dim=3)

    def _replay_prefix(self, probes: Probes) -> WanStream:
        """Re-roll the shared prefix from frame 0 with clean passes, once per group, with constant memory.

        From the second layer on, K/V depend on frames that have left the window, so encoding only the visible frames
        would be another conditional. Prompts switch where they did.
        """
        scenes = [scene.on_blocks(self.recipe.block_frames) for scene in probes.scenes]
        switches = any(0 < s.start <= probes.start for scene in scenes for s in scene.segments)
        # texts under the policy in force, with their graph: text adapters train
        stream = self.open([scene.prompt for scene in scenes], switches=switches)
        if probes.prefix is not None:
            for block in probes.prefix.split(self.recipe.block_frames, dim=2):
                with torch.no_grad():
                    stream = self.commit(block, stream)
                stream = self.follow(stream, scenes) if switches else stream
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
        plan = packed_plan(stream.policy, past, blocks, causal=True)
        clean = probes.clean[:, :, : plan.frames]
        timestep = torch.zeros(clean.shape[0], dtype=wide_dtype(clean), device=clean.device)
        view = stream.history.view(past) if past else None
        _, kv = self._ask(clean, timestep, stream.text, plan=plan, past=view, return_kv=True)
        return stream.history.commit(kv)

    def _predict_noisy(self, probes: Probes, stream: WanStream) -> Tensor:
        history, policy = stream.history, stream.policy
        past = history.frame_ids
        if policy.recomputes:
            past = policy.visible(probes.start, probes.clean.shape[2])
        streams = probes.noisy.shape[1]
        if stream.memory is None:
            blocks = self._blocks(probes, streams)
        else:  # one block at a time
            length = probes.noisy.shape[3]
            blocks = [PackedBlock(probes.start, length, s * length) for s in range(streams)]
        plan = packed_plan(policy, past, blocks, causal=False)
        x = probes.noisy.transpose(1, 2).flatten(2, 3)  # [N, C, S·F, H, W]
        sigma = probes.sigma.flatten(1)
        memory = stream.recalled()
        view = self._shown(history.view(past), stream.text, policy, probes.history_grad) if past else None
        if view is not None and memory is not None:
            view = replace(view, memory=memory.kv, batch=stream.batch)
        widest = torch.promote_types(sigma.dtype, wide_dtype(x))  # a float64 σ is rounded once, as timestep
        timestep = (1000 * sigma.to(widest)).to(wide_dtype(x))
        output, _ = self._ask(x, timestep, stream.text, plan=plan, past=view)
        velocity = self._velocity(output.to(x.dtype), x, expand_sigma(sigma.to(x.dtype)))
        return velocity.unflatten(2, (streams, -1)).transpose(1, 2)

    def dimensions(self, prompt: str) -> NetworkDimensions:
        config, block = self.network.config, self.recipe.block_frames
        _, height, width = self.recipe.latent
        _, p_h, p_w = config["patch_size"]
        far = 1000 * block
        seen = len(self.policy.visible(far, block)) + self.policy.remembered
        return NetworkDimensions(
            layers=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            ffn_width=config["ffn_dim"],
            tokens=(height // p_h) * (width // p_w),
            text_tokens=self.encode_text([prompt]).shape[1],
            window=None if seen == far else seen + block,
            checkpointing=bool(self.network.gradient_checkpointing),
        )

    def _velocity(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return output if self.recipe.prediction == "velocity" else velocity_from_x0(x, output, sigma)
