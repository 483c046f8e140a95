"""A reward in a process of its own on this machine, e.g. on a GPU of its own, asked through a pipe."""

import signal
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from framework.config.registry import one_line
from framework.interfaces import RewardFailed, RewardModel
from framework.reporting.progress import say
from framework.serving.digest import model_digest
from framework.serving.protocol import (
    Answer,
    Request,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    messages,
)
from framework.serving.service import refuse_memory
from framework.types import Scores, VideoBatch
from rewards.composite import refuse_policy

ANSWER, REFUSED, FAILED = b"a", b"r", b"f"
"""How a message of the worker starts: scores; what the caller got wrong; what the reward could not do."""


@dataclass
class Process:
    """A running worker and its end of the pipe."""

    process: Any
    pipe: Connection
    digest: str
    signals: tuple[str, ...]

    def end(self) -> None:
        """Tell it to go, and see that it does."""
        self.pipe.close()
        self.process.join(10.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class WorkerReward(RewardModel):
    """Scores of a reward model in a worker process, which is started when it is first asked and once again where it
    dies.

    model: what to build there, e.g. ``@videoalign.VideoAlign`` without parentheses, so that its weights are only in the
    worker; a model that is built already is copied into it. device: what ``cuda`` means there, e.g. "cuda:1". threads:
    CPU threads, None for as many as here. timeout_s: for one batch, the start included.
    """

    def __init__(
        self,
        model: Callable[[], RewardModel] | RewardModel,
        device: str = "cpu",
        threads: int | None = None,
        timeout_s: float = 900.0,
    ) -> None:
        if not timeout_s > 0 or (threads is not None and threads < 1):
            raise ValueError(
                f"WorkerReward.timeout_s and threads must be positive, got timeout_s={timeout_s}, threads={threads}"
            )
        if isinstance(model, RewardModel):
            refuse_policy(model, "WorkerReward")
        messages()
        self.model, self.device, self.threads, self.timeout_s = model, device, threads, timeout_s
        self._lock = threading.RLock()
        self._worker: Process | None = None
        self._digest: str | None = None
        self._end: Callable[[], object] = lambda: None

    @property
    def signals(self) -> tuple[str, ...]:
        return self._running().signals

    def score(self, videos: VideoBatch) -> Scores:
        """Raises RewardFailed where the worker dies twice, or takes longer than it may; ValueError for clips that the
        reward refuses."""
        with self._lock:
            request = Request.of(videos, self._running().digest)
            sent = encode_request(request)
            try:
                received = self._exchange(sent)
            except RewardFailed as error:
                say(f"{error}; it is started again")
                received = self._exchange(sent)
        kind, said = received[:1], received[1:]
        if kind == REFUSED:
            raise ValueError(said.decode())
        if kind == FAILED:
            raise RewardFailed(f"the reward worker: {said.decode()}")
        answer = decode_answer(said)
        if (answer.name, answer.clips) != (request.name, request.clips):
            raise RewardFailed("the reward worker answers for other clips than it was asked for")
        return answer.scores

    def unavailable(self) -> str | None:
        try:
            self._running()
        except ValueError as error:
            return str(error)
        return None

    def close(self) -> None:
        """End the worker. The next question starts another one."""
        with self._lock:
            self._worker = None
            self._end()

    def _running(self) -> Process:
        """The worker, started where there is none. Raises ValueError where its reward cannot be built."""
        with self._lock:
            if self._worker is None:
                self._worker = start(self.model, self.device, self.threads or torch.get_num_threads(), self.timeout_s)
                finalizer = weakref.finalize(self, self._worker.end)
                finalizer.atexit = True
                self._end = finalizer
                known = self._digest
                self._digest = self._worker.digest
                if known not in (None, self._digest):
                    raise ValueError(f"the reward worker was started again with another model: {self._digest}, {known}")
            return self._worker

    def _exchange(self, sent: bytes) -> bytes:
        """Ask once. Raises RewardFailed for a worker that is no more, after which there is none."""
        worker = self._running()
        try:
            worker.pipe.send_bytes(sent)
            if worker.pipe.poll(self.timeout_s):
                return worker.pipe.recv_bytes()
            reason = f"does not answer within WorkerReward.timeout_s={self.timeout_s:g}"
            worker.process.kill()
        except (OSError, EOFError):
            worker.process.join(5.0)
            code = worker.process.exitcode
            killed = f", killed by signal {-code}" if code is not None and code < 0 else ""
            reason = f"has died (exit code {code}{killed}); memory is the usual cause"
        except BaseException:  # an answer that nobody waited for would be taken for that of the next question
            worker.process.kill()
            self.close()
            raise
        self.close()
        raise RewardFailed(f"the reward worker {reason}")


def start(model: Callable[[], RewardModel] | RewardModel, device: str, threads: int, timeout_s: float) -> Process:
    """A worker that is ready. Raises ValueError where its reward cannot be built, RewardFailed where it dies of it."""
    context = get_context("spawn")  # a fork would take CUDA and the threads of this process with it
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, model, device, threads), daemon=True, name="reward-worker")
    process.start()
    there.close()
    try:
        if not here.poll(timeout_s):
            process.kill()
            raise RewardFailed(f"the reward worker is not ready within WorkerReward.timeout_s={timeout_s:g}")
        greeting = here.recv_bytes()
    except (OSError, EOFError) as error:
        process.join(5.0)
        raise RewardFailed(f"the reward worker died while it was started (exit code {process.exitcode})") from error
    if greeting[:1] != ANSWER:
        process.join(5.0)
        raise ValueError(f"the reward of the worker cannot be built: {greeting[1:].decode()}")
    digest, *signals = greeting[1:].decode().split("\n")
    return Process(process, here, digest, tuple(signals))


def work(pipe: Connection, model: Callable[[], RewardModel] | RewardModel, device: str, threads: int) -> None:
    """What the worker process does: build the reward, say what it is, then score until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the run at its next checkpoint, which needs this reward
    try:
        torch.set_num_threads(threads)
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
        built = model if isinstance(model, RewardModel) else model()
        refuse_memory(built)
        refuse_policy(built, "WorkerReward")
        digest = model_digest(built)
        greeting = ANSWER + "\n".join([digest, *built.signals]).encode()
    except Exception as error:  # building runs anything; the caller says it on one line
        pipe.send_bytes(FAILED + f"{type(error).__name__}: {one_line(error)}".encode())
        return
    pipe.send_bytes(greeting)
    with torch.no_grad():
        while True:
            try:
                pipe.send_bytes(answered(built, digest, pipe.recv_bytes()))
            except (EOFError, OSError):  # nobody is there any more
                return


def answered(model: RewardModel, digest: str, received: bytes) -> bytes:
    """The message that answers a request."""
    try:
        request = decode_request(received)
        scores = model.score(request.videos)
        return ANSWER + encode_answer(Answer(request.name, digest, request.clips, scores))
    except RewardFailed as error:
        return FAILED + one_line(error).encode()
    except ValueError as error:
        return REFUSED + one_line(error).encode()
    except Exception as error:  # one bad batch must not end the worker
        return FAILED + f"{type(error).__name__}: {one_line(error)}".encode()
