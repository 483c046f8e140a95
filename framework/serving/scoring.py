"""One thread that scores what many clients ask: a queue with an end, small requests together, no clip twice."""

import math
import threading
import time
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch

from framework.arguments import check_counts
from framework.interfaces import RewardModel
from framework.serving.protocol import Answer, Request
from framework.types import Scores, VideoBatch


class Busy(Exception):
    """The queue is full. retry_after: seconds after which it may not be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; come back after {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """How much a service takes on.

    waiting: requests in the queue; more are sent away. clips, frames: scored together at most, unless one request alone
    is larger. wait_s: how long a request waits for company. remembered: answers kept, so that a request that is sent
    again is not scored again. megabytes: of one request.
    """

    waiting: int = 64
    clips: int = 64
    frames: int = 4096
    wait_s: float = 0.02
    remembered: int = 256
    megabytes: int = 1024

    def __post_init__(self) -> None:
        check_counts("Limits.", waiting=self.waiting, clips=self.clips, frames=self.frames, megabytes=self.megabytes)
        if not self.wait_s >= 0 or self.remembered < 0:
            raise ValueError(f"Limits.wait_s and remembered must be 0 or more, got {self.wait_s}, {self.remembered}")


@dataclass
class Telemetry:
    """What a service has done. seconds: from request to answer, of the last 1024."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1024))

    def quantile(self, share: float) -> float:
        """The latency that so many requests stay within, seconds; 0 before the first."""
        return quantile(list(self.seconds), share)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


@dataclass
class Waiting:
    """A request in the queue."""

    request: Request
    future: "Future[Answer]"
    since: float

    def fits(self, batch: "Sequence[Waiting]", limits: Limits) -> bool:
        """Whether it can be scored together with a batch: clips of one shape and rate, and not too many."""
        videos, other = self.request.videos, batch[0].request.videos
        if (videos.frames.shape[1:], videos.fps) != (other.frames.shape[1:], other.fps):
            return False
        clips = len(videos) + sum(len(waiting.request.videos) for waiting in batch)
        return clips <= limits.clips and clips * videos.frames.shape[1] <= limits.frames


class ScoringQueue:
    """Requests in, answers out; `close` ends its thread. digest: of the model, for the answers."""

    def __init__(self, model: RewardModel, digest: str, limits: Limits) -> None:
        self.model, self.digest, self.limits = model, digest, limits
        self.telemetry = Telemetry()
        self._pending: deque[Waiting] = deque()
        self._asked: dict[str, Future[Answer]] = {}
        self._known: OrderedDict[str, Answer] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is being scored."""
        return not self._asked

    def __len__(self) -> int:
        return len(self._pending)

    def submit(self, request: Request, anew: bool = False) -> "Future[Answer]":
        """The answer to come. A request that is known, or being scored, is not scored again unless ``anew``.

        Raises Busy where too many wait already.
        """
        with self._changed:
            if self._closed:
                raise Busy(1)
            self.telemetry.counts["requests"] += 1
            if request.name in self._known and not anew:
                self.telemetry.counts["remembered"] += 1
                self._known.move_to_end(request.name)
                known: Future[Answer] = Future()
                known.set_result(self._known[request.name])
                return known
            if request.name in self._asked:
                return self._asked[request.name]
            if len(self._pending) >= self.limits.waiting:
                self.telemetry.counts["sent_away"] += 1
                raise Busy(max(1, math.ceil(len(self._pending) * self.telemetry.quantile(0.5))))
            waiting = Waiting(request, Future(), time.monotonic())
            self._asked[request.name] = waiting.future
            self._pending.append(waiting)
            self._changed.notify_all()
            return waiting.future

    def close(self) -> None:
        """Score what is being scored, drop the rest, end the thread."""
        with self._changed:
            self._closed = True
            dropped, self._pending = list(self._pending), deque()
            self._changed.notify_all()
        for waiting in dropped:
            waiting.future.set_exception(Busy(1))
        self._thread.join()

    def _run(self) -> None:
        with torch.no_grad():  # grad mode is a thread's own
            while batch := self._next():
                self._answer(batch)

    def _next(self) -> list[Waiting]:
        """The requests to score together, empty at the end."""
        with self._changed:
            while not self._pending and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            batch = [self._pending.popleft()]
            until = time.monotonic() + self.limits.wait_s
            while True:
                for waiting in list(self._pending):
                    if waiting.fits(batch, self.limits):
                        self._pending.remove(waiting)
                        batch.append(waiting)
                left = until - time.monotonic()
                if left <= 0 or self._closed or self._pending:  # what does not fit waits no longer than it has to
                    return batch
                self._changed.wait(left)

    def _answer(self, batch: list[Waiting]) -> None:
        """Score a batch and tell everybody; where it fails, every request fails for itself."""
        try:
            parts = score_together(self.model, [waiting.request.videos for waiting in batch])
        except Exception as error:  # whatever a model raises belongs to those who asked, not to this thread
            if len(batch) > 1:
                for waiting in batch:
                    self._answer([waiting])
                return
            self.telemetry.counts["failed"] += 1
            if not isinstance(error, ValueError):
                traceback.print_exc()
            self._done(batch[0].request.name, None)
            batch[0].future.set_exception(error)
            return
        self.telemetry.counts["batches"] += 1
        for waiting, scores in zip(batch, parts, strict=True):
            request = waiting.request
            answer = Answer(request.name, self.digest, request.clips, scores)
            self.telemetry.counts["clips"] += len(request.clips)
            self.telemetry.counts["invalid_clips"] += invalid_clips(scores)
            self.telemetry.seconds.append(time.monotonic() - waiting.since)
            self._done(request.name, answer)
            waiting.future.set_result(answer)

    def _done(self, name: str, answer: Answer | None) -> None:
        with self._changed:
            self._asked.pop(name, None)
            # a clip without a score may have one the next time
            if answer is not None and not invalid_clips(answer.scores) and self.limits.remembered:
                self._known[name] = answer
                while len(self._known) > self.limits.remembered:
                    self._known.popitem(last=False)


def invalid_clips(scores: Scores) -> int:
    """Clips without a score in some signal."""
    return int((~torch.stack(list(scores.valid.values())).all(0)).sum())


def score_together(model: RewardModel, parts: Sequence[VideoBatch]) -> list[Scores]:
    """The scores of several batches of one shape and rate, scored as one. Raises RuntimeError for a model that gives
    something else than it says."""
    whole = parts[0] if len(parts) == 1 else replace(
        parts[0], frames=torch.cat([p.frames for p in parts]), windows=tuple(w for p in parts for w in p.windows)
    )  # fmt: skip
    scores = model.score(whole)
    if set(scores.values) != set(model.signals) or any(v.shape != (len(whole),) for v in scores.values.values()):
        shapes = {name: list(value.shape) for name, value in scores.values.items()}
        raise RuntimeError(f"{type(model).__name__} gives {shapes} for {len(whole)} clips and {list(model.signals)}")
    if len(parts) == 1:
        return [scores]
    stops = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    return [rows_of(scores, slice(stop - len(part), stop)) for part, stop in zip(parts, stops, strict=True)]


def rows_of(scores: Scores, rows: slice) -> Scores:
    """The scores of some clips, without the columns of windows that only other clips have."""
    windows = {name: value[rows] for name, value in scores.windows.items()}
    used = {name: int((~value.isnan()).any(0).nonzero().max().item() + 1) if (~value.isnan()).any() else 1
            for name, value in windows.items()}  # fmt: skip
    return Scores(
        {name: value[rows] for name, value in scores.values.items()},
        {name: valid[rows] for name, valid in scores.valid.items()},
        {name: value[:, : used[name]] for name, value in windows.items()},
    )
