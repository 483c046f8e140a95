"""Asking one of several services for something: which one, how often, how long, and when to give up."""

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from framework.config.registry import one_line
from framework.interfaces import RewardFailed
from framework.serving.access import is_loopback

AGAIN = frozenset({408, 429, *range(500, 600)})
"""Statuses after which the same request may go well."""
CONNECT_S = 5.0


@dataclass(frozen=True)
class Patience:
    """How long a request is tried. retries: further attempts. backoff_s: before the first of them, doubled for each
    next one up to ``longest_s``, times a random factor from ½ to 1½. deadline_s: of all attempts together. breaker: an
    endpoint that failed so often in a row is left alone for ``breaker_s``, while there is another."""

    retries: int = 4
    backoff_s: float = 0.5
    longest_s: float = 30.0
    deadline_s: float = 900.0
    breaker: int = 3
    breaker_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.retries <= 4:
            raise ValueError(
                f"Patience.retries must lie in 0 … 4, got {self.retries}; wait longer between them with backoff_s"
            )
        if self.breaker < 1:
            raise ValueError(f"Patience.breaker must be at least 1, got {self.breaker}")
        for name in ("backoff_s", "longest_s", "deadline_s", "breaker_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Patience.{name} must be 0 or more and finite, got {getattr(self, name)}")

    def pause(self, attempt: int, jitter: float, asked: float) -> float:
        """Seconds before attempt ``attempt`` + 1. jitter: from 0 to 1. asked: what the service asked for."""
        return max(min(self.backoff_s * 2**attempt, self.longest_s) * (0.5 + jitter), min(asked, self.longest_s))


def connect(url: str, headers: Mapping[str, str]) -> Any:
    """An httpx.Client for a service. Raises ValueError without httpx."""
    try:
        import httpx
    except ImportError as error:
        raise ValueError("asking a reward service needs httpx: pip install 'armillary[serve]'") from error
    local = is_loopback(urlsplit(url).hostname or "")
    # a proxy of the environment is not meant for services on this machine
    return httpx.Client(base_url=url, headers=dict(headers), trust_env=not local, timeout=CONNECT_S)


@dataclass(frozen=True)
class Wire:
    """What a client touches of the world; a test gives its own."""

    connect: Callable[[str, Mapping[str, str]], Any] = connect
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = field(default_factory=lambda: random.Random().random)


class Refused(ValueError):
    """A service says that the request itself is wrong: asking again would not help, nor would a failure policy."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Endpoint:
    """One service. failures: in a row. closed_until: time before which it is left alone."""

    url: str
    client: Any
    failures: int = 0
    closed_until: float = float("-inf")


class Caller:
    """Services that are as good as each other, asked in turn."""

    def __init__(self, urls: Sequence[str], headers: Mapping[str, str], patience: Patience, wire: Wire) -> None:
        self.patience, self.wire = patience, wire
        self.endpoints = [Endpoint(url, wire.connect(url, headers)) for url in urls]
        self.retried = 0
        self._turn = 0
        self._lock = threading.Lock()

    def call(self, path: str, timeout_s: float, **request: Any) -> tuple[Endpoint, Any]:
        """(who answered, its answer of status 200). Raises Refused, or RewardFailed where nobody answers in time."""
        import httpx

        started, attempt = self.wire.now(), 0
        while True:
            endpoint, asked = self._next(), 0.0
            left = self.patience.deadline_s - (self.wire.now() - started)
            try:
                answer = self._ask(endpoint, path, min(timeout_s, max(left, 0.001)), request)
            except httpx.RequestError as error:
                reason = f"{endpoint.url}: {type(error).__name__}: {one_line(error)}"
                self._failed(endpoint)
            else:
                if answer.status_code == 200:
                    self._answered(endpoint)
                    return endpoint, answer
                reason = f"{endpoint.url} answers {answer.status_code}: {one_line(answer.text)[:300]}"
                if answer.status_code not in AGAIN:
                    raise Refused(answer.status_code, reason)
                if answer.status_code == 429:
                    asked = seconds(answer.headers.get("retry-after", ""))
                else:
                    self._failed(endpoint)
            pause = self.patience.pause(attempt, self.wire.jitter(), asked)
            spent = self.wire.now() - started
            if attempt == self.patience.retries or spent + pause > self.patience.deadline_s:
                raise RewardFailed(f"{reason} (attempt {attempt + 1}, after {spent:.0f} s)")
            attempt += 1
            self.retried += 1
            self.wire.sleep(pause)

    def _ask(self, endpoint: Endpoint, path: str, timeout_s: float, request: Mapping[str, Any]) -> Any:
        """One attempt. Raises httpx.RequestError, also for an answer that trickles in: httpx times byte after byte."""
        import httpx

        until, parts = self.wire.now() + timeout_s, []
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        with endpoint.client.stream("POST" if request else "GET", path, timeout=timeout, **request) as answer:
            for part in answer.iter_bytes():
                parts.append(part)
                if self.wire.now() > until:
                    raise httpx.ReadTimeout(f"the answer is not complete after {timeout_s:g} s")
            kept = {name: answer.headers[name] for name in ("retry-after",) if name in answer.headers}
            return httpx.Response(answer.status_code, headers=kept, content=b"".join(parts))

    def _next(self) -> Endpoint:
        """Whose turn it is, of those that work; where none does, the one that was left alone for longest."""
        with self._lock:
            turn, self._turn = self._turn, self._turn + 1
            order = [self.endpoints[(turn + i) % len(self.endpoints)] for i in range(len(self.endpoints))]
            working = [endpoint for endpoint in order if endpoint.closed_until <= self.wire.now()]
            return working[0] if working else min(order, key=lambda endpoint: endpoint.closed_until)

    def _failed(self, endpoint: Endpoint) -> None:
        with self._lock:
            endpoint.failures += 1
            if endpoint.failures >= self.patience.breaker:
                endpoint.closed_until = self.wire.now() + self.patience.breaker_s

    def _answered(self, endpoint: Endpoint) -> None:
        with self._lock:
            endpoint.failures, endpoint.closed_until = 0, float("-inf")


def seconds(text: str) -> float:
    """What a Retry-After header says; 0 for a date, or for nothing."""
    return float(text) if text.isdigit() else 0.0
