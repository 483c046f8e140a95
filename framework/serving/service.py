"""A reward model as a web service: who may ask what, what the answers are, and how it is known to work."""

import asyncio
import hmac
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from framework import __version__
from framework.config.registry import one_line
from framework.interfaces import RewardFailed, RewardModel
from framework.serving.digest import model_digest
from framework.serving.protocol import (
    MEDIA_TYPE,
    SCHEMA,
    ProtocolError,
    Request,
    decode_request,
    encode_answer,
    messages,
)
from framework.serving.scoring import Busy, Limits, ScoringQueue
from framework.types import Scores, VideoBatch, Window

RETEST_S = 30.0
"""Seconds for which a passed self-test is believed."""


@runtime_checkable
class Detailed(Protocol):
    """A reward that says what else its scores depend on."""

    def details(self) -> Mapping[str, str]:
        """E.g. attention implementation, dtype, hashes of its prompt template and weights."""
        ...


@dataclass(frozen=True)
class ProbeClip:
    """The clip of the self-test, coloured stripes that move, of a size and with a prompt that the reward takes."""

    frames: int = 16
    height: int = 240
    width: int = 416
    fps: float = 16.0
    prompt: str = "coloured stripes move to the right"

    def videos(self) -> VideoBatch:
        """A batch of this clip alone."""
        t, c, y, x = torch.meshgrid(*map(torch.arange, (self.frames, 3, self.height, self.width)), indexing="ij")
        pixels = (7 * (x - t) + 3 * y + 85 * c) % 256
        window = Window(0, self.frames, self.prompt)
        return VideoBatch(pixels[None].to(torch.uint8), self.fps, ((window,),))


class RewardService:
    """A model, its queue and its self-test. Raises ValueError for a model that cannot score the probe."""

    def __init__(self, model: RewardModel, probe: ProbeClip | None = None, limits: Limits | None = None) -> None:
        self.model, self.limits = model, limits or Limits()
        refuse_memory(model)
        refuse_policy(model)
        self.digest = model_digest(model)
        self.queue = ScoringQueue(model, self.digest, self.limits)
        self.probe = Request.of((probe or ProbeClip()).videos(), self.digest)
        try:
            self._expected = self.queue.submit(self.probe).result().scores
        except Exception as error:
            self.queue.close()
            raise ValueError(
                f"{type(model).__name__} cannot score the clip of the self-test: {one_line(error)}; change it with "
                f"serving.ProbeClip, or the reward"
            ) from error
        if not all(bool(valid.all()) for valid in self._expected.valid.values()):
            self.queue.close()
            raise ValueError(f"{type(model).__name__} gives the clip of the self-test no score in every signal; "
                             f"change it with serving.ProbeClip")  # fmt: skip
        self._tested = time.monotonic()

    async def unready(self) -> str | None:
        """Why it cannot score now, None where it can."""
        if not self.queue.alive:
            return "the scoring thread has ended"
        reason = await asyncio.to_thread(self.model.unavailable)
        if reason is None and time.monotonic() - self._tested > RETEST_S and self.queue.idle:
            try:
                answer = await asyncio.shield(asyncio.wrap_future(self.queue.submit(self.probe, anew=True)))
            except Busy:
                return None  # it works, and has no time
            except Exception as error:
                return f"the self-test fails: {type(error).__name__}: {one_line(error)}"
            reason = drifted(answer.scores, self._expected)
            self._tested = time.monotonic() if reason is None else self._tested
        return reason

    def info(self) -> dict[str, Any]:
        """What a client has to know before it believes a score, and how the service is doing."""
        said = self.model.details() if isinstance(self.model, Detailed) else {}
        return {
            "schema": SCHEMA, "version": __version__, "reward": type(self.model).__name__,
            "signals": list(self.model.signals), "digest": self.digest, "details": dict(said),
            "limits": {"megabytes": self.limits.megabytes, "waiting": self.limits.waiting}, "counts": self.counts(),
        }  # fmt: skip

    def counts(self) -> dict[str, float]:
        """Telemetry under plain names; latencies in seconds from request to answer."""
        telemetry = self.queue.telemetry
        names = ("requests", "batches", "clips", "invalid_clips", "remembered", "sent_away", "failed")
        return {
            **{name: telemetry.counts[name] for name in names}, "waiting": len(self.queue),
            "latency_p50_s": telemetry.quantile(0.5), "latency_p95_s": telemetry.quantile(0.95),
        }  # fmt: skip


def refuse_memory(model: RewardModel) -> None:
    """Raises ValueError for a reward whose scores depend on what it saw before: a checkpoint could not hold that."""
    if holds_something(model.state_dict()):
        raise ValueError(f"{type(model).__name__} remembers what it has seen, which a checkpoint of the run must hold; "
                         f"use it inside of the run")  # fmt: skip


def refuse_policy(model: RewardModel) -> None:
    """Raises ValueError for a reward that decides what failed scores lead to: only the run sees all of a step."""
    failed = Scores.of({name: torch.full((2,), torch.nan) for name in model.signals})
    try:
        left = set(model.settle(failed, torch.zeros(2, dtype=torch.long)).values)
    except RewardFailed:
        left = set()
    if left != set(model.signals):
        raise ValueError(f"{type(model).__name__} decides about failed scores of a whole step, which a service never "
                         f"sees; serve what is inside of it and put the policy around the client")  # fmt: skip


def holds_something(state: object) -> bool:
    """Whether a state has anything in it but empty dicts."""
    return any(map(holds_something, state.values())) if isinstance(state, dict) else True


def drifted(scores: Scores, expected: Scores) -> str | None:
    """In what the self-test differs from that of the start, None in nothing."""
    for name, value in expected.values.items():
        if not torch.allclose(scores.values[name], value, rtol=1e-3, atol=1e-3):
            return f"the self-test gives {name}={scores.values[name].item():.4f}, at the start {value.item():.4f}"
    return None


def build_app(service: RewardService, token: str | None = None) -> Any:
    """The ASGI application. token: what clients have to bring, None for nothing. Raises ValueError without FastAPI."""
    try:
        from fastapi import FastAPI, Response
        from fastapi import Request as HttpRequest
        from starlette.concurrency import run_in_threadpool
    except ImportError as error:
        raise ValueError("serving rewards needs FastAPI: pip install 'armillary[serve]'") from error
    messages()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    refusal = partial(Response, media_type="text/plain; charset=utf-8")
    most = service.limits.megabytes * 2**20

    @app.middleware("http")
    async def admit(request: HttpRequest, proceed: Any) -> Any:
        if token is not None and request.url.path != "/health":
            brought = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(brought, f"Bearer {token}".encode()):
                return refusal("the token is missing or wrong", 401, {"WWW-Authenticate": "Bearer"})
        return await proceed(request)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Any:
        reason = await service.unready()
        return {"ready": True} if reason is None else refusal(one_line(reason), 503)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return service.info()

    @app.get("/metrics")
    async def metrics() -> Any:
        lines = [f"armillary_reward_{name} {value:g}" for name, value in service.counts().items()]
        return refusal("\n".join(lines) + "\n")

    @app.post("/score")
    async def score(request: HttpRequest) -> Any:
        if request.headers.get("content-type") != MEDIA_TYPE:
            return refusal(f"the content type must be {MEDIA_TYPE}", 415)
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > most:
                return refusal(f"a request of more than serving.Limits.megabytes={most // 2**20}", 413)
        try:
            asked = await run_in_threadpool(decode_request, b"".join(parts))
        except ProtocolError as error:
            return refusal(one_line(error), 400)
        if asked.digest != service.digest:
            return refusal(f"this is {service.digest}, not {asked.digest}", 409)
        try:
            answer = await asyncio.shield(asyncio.wrap_future(service.queue.submit(asked)))
        except Busy as busy:
            return refusal(str(busy), 429, {"Retry-After": str(math.ceil(busy.retry_after))})
        except RewardFailed as error:
            return refusal(one_line(error), 503)
        except ValueError as error:
            return refusal(one_line(error), 422)
        except Exception as error:
            return refusal(f"{type(error).__name__}: {one_line(error)}", 500)
        return Response(encode_answer(answer), media_type=MEDIA_TYPE)

    return app
