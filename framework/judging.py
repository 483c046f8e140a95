"""Rolling out and scoring the groups of a step: all and then all, or group after group with the scoring behind.

    groups_at_once = 1      roll out 1 │ roll out 2 │ roll out 3 │ wait
                                       │ score 1    │ score 2    │ score 3

One thread scores, in order, while the calling one rolls out what follows. It never reaches beyond its step: leaving the
`with` waits for what is being scored and drops the rest, also where something fails, so no score is made with a policy
that has moved on. Scores are those of the same groups without a thread, bit for bit; against a rollout of all groups
at once they differ by the rounding of other batches.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from types import TracebackType

import torch
from torch import Tensor

from framework.distributed import widened
from framework.evaluation import decode_tape
from framework.interfaces import RewardModel, StreamingGenerator
from framework.kernels import TransitionKernel
from framework.nonfinite import all_finite
from framework.records import Endpoints, Record
from framework.rollout import device_of, roll_out
from framework.types import GroupPlan, Scores, Tape, VideoBatch


def check_available(*rewards: RewardModel) -> None:
    """Raises ValueError for a reward that cannot score now, before anything is made for it to score."""
    for reward in rewards:
        if (reason := reward.unavailable()) is not None:
            raise ValueError(f"{type(reward).__name__} cannot score: {reason}; start its service, or change REWARD")


class Judging:
    """The rollout and the scores of one step. groups_at_once: see above, None for all groups and no thread.
    branches_at_once: as `rollout.roll_out` takes it.

    laps: with a thread, seconds that it spent scoring, waiting or not.
    """

    def __init__(
        self,
        generator: StreamingGenerator,
        reward: RewardModel,
        groups_at_once: int | None = None,
        branches_at_once: int | None = None,
    ) -> None:
        self.generator, self.reward = generator, reward
        self.groups_at_once, self.branches_at_once = groups_at_once, branches_at_once
        self.laps: dict[str, float] = {}
        self._tape: Tape | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[Scores]] = []

    def __enter__(self) -> "Judging":
        if self.groups_at_once is not None:
            self._thread = ThreadPoolExecutor(1, "scoring", use_device, (device_of(self.generator),))
            self.laps["scoring_s"] = 0.0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def roll_out(self, plans: Sequence[GroupPlan], kernel: TransitionKernel, keep: frozenset[type[Record]]) -> Tape:
        """`rollout.roll_out` of all groups under the policy in force. What is not finite is not scored."""
        if self._thread is None or self.groups_at_once is None:
            self._tape = roll_out(self.generator, plans, kernel, keep, self.branches_at_once)
            return self._tape
        tapes: list[Tape] = []
        for first in range(0, len(plans), self.groups_at_once):
            part = plans[first : first + self.groups_at_once]
            tape = roll_out(self.generator, part, kernel, keep, self.branches_at_once)
            tapes.append(tape)
            if all_finite(tape[Endpoints].latents):
                self._pending.append(self._thread.submit(self._score, decode_tape(self.generator, tape)))
        return joined_tapes(tapes)

    def scores(self) -> Scores:
        """The scores of all clips, in the order of the tape. Raises what scoring raised."""
        if self._thread is not None:
            return joined_scores([part.result() for part in self._pending])
        if self._tape is None:
            raise RuntimeError("Judging.scores is asked before Judging.roll_out")
        return scored(self.reward, decode_tape(self.generator, self._tape))

    def _score(self, videos: VideoBatch) -> Scores:
        started = time.perf_counter()
        scores = scored(self.reward, videos)
        self.laps["scoring_s"] += time.perf_counter() - started
        return scores


def scored(reward: RewardModel, videos: VideoBatch) -> Scores:
    """The scores of some clips, their signals in the order in which the reward names them: ranks exchange them in it,
    and one whose reward fails has no other. Raises ValueError for other signals than it names."""
    scores = reward.score(videos)
    if set(scores.values) != set(reward.signals):
        raise ValueError(
            f"{type(reward).__name__} gives scores of {sorted(scores.values)}, its signals are {sorted(reward.signals)}"
        )
    values, valid = ({name: part[name] for name in reward.signals} for part in (scores.values, scores.valid))
    return Scores(values, valid, scores.windows)


def use_device(device: torch.device) -> None:
    """Let a thread mean the same by ``cuda`` as the one that started it: torch keeps that per thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def joined_tapes(tapes: Sequence[Tape]) -> Tape:
    """One tape of the clips of several, in their order; they are of the same kind and window."""
    plans = tuple(plan for tape in tapes for plan in tape.plans)
    return Tape(plans, {kind: joined_records([tape.records[kind] for tape in tapes]) for kind in tapes[0].records})


def joined_records(records: Sequence[Record]) -> Record:
    """Records of one kind as one: tensors, which count clips or groups, one after the other; the rest is alike."""
    values: dict[str, object] = {}
    for field in fields(records[0]):  # pyright: ignore[reportArgumentType]
        parts = [getattr(record, field.name) for record in records]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if (tensors and len(tensors) < len(parts)) or (not tensors and any(part != parts[0] for part in parts)):
            raise ValueError(f"{type(records[0]).__name__}.{field.name} differs between groups of one step")
        values[field.name] = torch.cat(tensors) if tensors else parts[0]
    return type(records[0])(**values)


def joined_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several batches as those of one; a batch without windows, or with fewer, has NaN there."""
    return Scores(
        {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
        {name: torch.cat([part.valid[name] for part in parts]) for name in parts[0].valid},
        {name: joined_windows(name, parts) for name in parts[0].values if any(name in p.windows for p in parts)},
    )


def joined_windows(name: str, parts: Sequence[Scores]) -> Tensor:
    """[N, W] of one signal, W of the batch with most windows."""

    def own(part: Scores) -> Tensor:
        windows: Mapping[str, Tensor] = part.windows
        return windows[name] if name in windows else part.values[name].new_empty(len(part.values[name]), 0)

    width = max(own(part).shape[1] for part in parts)
    return torch.cat([widened(own(part), width) for part in parts])
