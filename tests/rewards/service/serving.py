"""What the tests of served rewards share: a service without a port, a client whose clock is not the wall's, faults."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from framework.interfaces import RewardModel
from framework.serving.protocol import Answer, decode_answer, encode_answer
from framework.serving.scoring import Limits
from framework.serving.service import ProbeClip, RewardService, build_app
from framework.types import Scores, VideoBatch, Window
from rewards.service.calling import Patience, Wire
from rewards.service.client import HttpReward
from tests.support import Brightness

for name in ("httpx", "fastapi", "uvicorn", "msgpack"):
    pytest.importorskip(name, reason="serving rewards is an extra: pip install 'armillary[serve]'")

httpx = pytest.importorskip("httpx")
URL = "http://one.test"
PROBE = ProbeClip(3, 4, 4)


def clips(count: int, seed: int = 0, frames: int = 3) -> VideoBatch:
    """Small random clips, each with a prompt of its own."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, frames, 3, 4, 4), generator=random, dtype=torch.uint8)
    return VideoBatch(pixels, 8.0, tuple((Window(0, frames, f"clip {i} é"),) for i in range(count)))


@dataclass
class Counted(RewardModel):
    """Counts its batches; scores of clips whose first pixel is in ``failing`` fail. settings: part of the digest."""

    settings: str = ""
    failing: tuple[int, ...] = ()
    batches: list[int] = field(default_factory=list, init=False)

    @property
    def signals(self) -> tuple[str, ...]:
        return Brightness().signals

    def score(self, videos: VideoBatch) -> Scores:
        self.batches.append(len(videos))
        failed = torch.isin(videos.frames[:, 0, 0, 0, 0], torch.tensor(self.failing, dtype=torch.uint8))
        values = Brightness().score(videos).values
        return Scores.of({name: value.masked_fill(failed, torch.nan) for name, value in values.items()})


@contextmanager
def service_of(model: RewardModel | None = None, **limits: Any) -> Iterator[RewardService]:
    """A service that has passed its self-test."""
    service = RewardService(model or Brightness(), PROBE, Limits(**{"wait_s": 0.0} | limits))
    try:
        yield service
    finally:
        service.queue.close()


class Asgi(httpx.BaseTransport):
    """Requests of a plain client, answered by an application in this process."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def ask() -> httpx.Response:
            inside = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=inside) as client:
                content = request.read()
                return await client.request(request.method, request.url, headers=request.headers, content=content)

        answer = asyncio.run(ask())
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


Fault = int | Exception | Callable[[httpx.Response], httpx.Response] | None
"""What happens to a question: a status, an error of the connection, an answer that is changed; None for nothing."""


@dataclass
class Faulty(httpx.BaseTransport):
    """Questions for scores meet the faults one after the other, then none."""

    inner: httpx.BaseTransport
    faults: list[Fault]
    asked: int = 0
    retry_after: str = ""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != "/score":
            return self.inner.handle_request(request)
        self.asked += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return httpx.Response(fault, headers={"Retry-After": self.retry_after} if self.retry_after else {})
        if isinstance(fault, Exception):
            raise fault
        answer = self.inner.handle_request(request)
        return answer if fault is None else fault(answer)


@dataclass
class Clock:
    """Time that passes only while somebody sleeps."""

    pauses: list[float] = field(default_factory=list)
    during: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.during()

    def now(self) -> float:
        return sum(self.pauses)


def client(
    transports: dict[str, httpx.BaseTransport], clock: Clock | None = None, jitter: float = 0.5, **options: Any
) -> HttpReward:
    """A client whose every URL is answered by a transport. jitter: ½ leaves the pauses as they are."""
    reward = HttpReward(list(transports), **options)
    clock = clock or Clock()

    def connect(url: str, headers: Any) -> httpx.Client:
        return httpx.Client(base_url=url, headers=dict(headers), transport=transports[url])

    reward.wire = Wire(connect, clock.sleep, clock.now, lambda: jitter)
    return reward


def client_of(service: RewardService, faults: Sequence[Fault] = (), **options: Any) -> tuple[HttpReward, Faulty]:
    """A client of one service, with faults on the way."""
    transport = Faulty(Asgi(build_app(service)), list(faults))
    return client({URL: transport}, **options), transport


def changed(change: Callable[[Answer], Answer]) -> Callable[[httpx.Response], httpx.Response]:
    """The fault of an answer that says something else."""

    def fault(response: httpx.Response) -> httpx.Response:
        return httpx.Response(200, content=encode_answer(change(decode_answer(response.content))))

    return fault


def same(left: Scores, right: Scores) -> bool:
    """Equal bit for bit, NaN equal to NaN."""
    return left.values.keys() == right.values.keys() and all(
        torch.equal(left.values[n].nan_to_num(9), right.values[n].nan_to_num(9))
        and torch.equal(left.valid[n], right.valid[n])
        for n in left.values
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Listening:
    """A service on a port of this machine, in a thread."""

    def __init__(self, service: RewardService, port: int) -> None:
        import uvicorn

        self.port = port
        config = uvicorn.Config(build_app(service), "127.0.0.1", port, log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), f"port {port} is taken"
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


PATIENT = Patience(backoff_s=1.0)
