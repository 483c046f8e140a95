"""A reward behind HTTP: `armillary serve-rewards` scores, this one asks and believes nothing that it cannot check."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from framework.config.registry import one_line
from framework.interfaces import RewardModel
from framework.judging import joined_scores
from framework.reporting.progress import say
from framework.serving.access import read_token
from framework.serving.protocol import MEDIA_TYPE, SCHEMA, ProtocolError, Request, decode_answer, encode_request
from framework.serving.scoring import quantile
from framework.types import Scores, VideoBatch
from rewards.failure import only, without_scores
from rewards.service.calling import Caller, Patience, Refused, Wire

CONFLICT = 409
"""The status of a service that holds another model than the request means."""


SCHEMES = ("http://", "https://")


class AnotherModel(ValueError):
    """A service answers with another reward model than the run started with. No failure policy lets a run go on."""


@dataclass(frozen=True)
class Handshake:
    """What services say they are."""

    digest: str
    signals: tuple[str, ...]


@dataclass
class HttpReward(RewardModel):
    """Scores of services that hold one and the same reward model; they are asked in turn.

    urls: e.g. ``http://127.0.0.1:8100``. token_file: its text is brought along. names: the signals that it must give;
    None takes what the first service says. model_digest: which model it must be, as the service prints it; None takes
    that of the start, which checkpoints hold. timeout_s and timeout_per_frame_s: of one attempt, for a request of so
    many frames. megabytes: a request holds as many clips as fit, one at least.

    A request that cannot be answered raises RewardFailed. Scores that come back for other clips, in another order or
    number, or not finite, are invalid.
    """

    urls: Sequence[str]
    token_file: str | None = None
    names: Sequence[str] | None = None
    model_digest: str | None = None
    timeout_s: float = 60.0
    timeout_per_frame_s: float = 0.1
    megabytes: int = 64
    patience: Patience = field(default_factory=Patience)
    wire: Wire = field(default_factory=Wire, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.urls or isinstance(self.urls, str) or not all(url.startswith(SCHEMES) for url in self.urls):
            raise ValueError(f"HttpReward.urls must list services such as 'http://127.0.0.1:8100', got {self.urls!r}")
        if not self.timeout_s > 0 or self.timeout_per_frame_s < 0 or self.megabytes < 1:
            raise ValueError(
                f"HttpReward.timeout_s and megabytes must be positive and timeout_per_frame_s 0 or more, got "
                f"{self.timeout_s}, {self.megabytes}, {self.timeout_per_frame_s}"
            )
        self._caller: Caller | None = None
        self._handshake: Handshake | None = None
        self._seconds: list[float] = []

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(self.names) if self.names is not None else self.handshake().signals

    @property
    def caller(self) -> Caller:
        """The connections, made when they are first needed."""
        if self._caller is None:
            token = {} if self.token_file is None else {"Authorization": f"Bearer {read_token(self.token_file)}"}
            self._caller = Caller(self.urls, token, self.patience, self.wire)
        return self._caller

    def handshake(self) -> Handshake:
        """What model the services hold, asked once. Raises RewardFailed, or AnotherModel for one that is not meant."""
        if self._handshake is None:
            endpoint, answer = self.caller.call("/info", self.timeout_s)
            self._handshake = self._greet(endpoint.url, answer)
        return self._handshake

    def _greet(self, url: str, answer: Any) -> Handshake:
        """Read ``/info``."""
        try:
            info = answer.json()
            said = Handshake(str(info["digest"]), tuple(map(str, info["signals"])))
            schema = info["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{url} is no reward service: /info is unreadable ({one_line(error)})") from error
        if schema != SCHEMA:
            raise ValueError(f"{url} speaks schema {schema}, not {SCHEMA}; run the same armillary at both ends")
        if self.names is not None and set(said.signals) != set(self.names):
            raise ValueError(f"{url} gives the signals {list(said.signals)}, not HttpReward.names={list(self.names)}")
        self._meant(url, said.digest)
        return said

    def _meant(self, url: str, digest: str) -> None:
        """Raises AnotherModel unless a digest is that of the run."""
        known = self.model_digest if self._handshake is None else self._handshake.digest
        if known is not None and digest != known:
            raise AnotherModel(
                f"{url} holds another reward model than this run started with: digest {digest}, not {known}; serve the "
                f"first one again (same reward, settings, weights and armillary version), or start a new run"
            )

    def score(self, videos: VideoBatch) -> Scores:
        parts, digest = list(self._requests(videos)), self.handshake().digest
        if len(parts) == 1 or len(self.urls) == 1:
            return joined_scores([self._ask(part, digest) for part in parts])
        with ThreadPoolExecutor(len(self.urls), "asking") as threads:
            return joined_scores(list(threads.map(lambda part: self._ask(part, digest), parts)))

    def _requests(self, videos: VideoBatch) -> Iterator[VideoBatch]:
        """The clips, as many at a time as a request holds."""
        each = max(1, self.megabytes * 2**20 // max(1, videos.frames[0].numel()))
        for first in range(0, len(videos), each):
            rows = slice(first, first + each)
            yield replace(videos, frames=videos.frames[rows].cpu(), windows=videos.windows[rows])

    def _ask(self, videos: VideoBatch, digest: str) -> Scores:
        """The scores of one request."""
        request, started = Request.of(videos, digest), time.perf_counter()
        content = {"content": encode_request(request), "headers": {"Content-Type": MEDIA_TYPE}}
        timeout = self.timeout_s + self.timeout_per_frame_s * videos.frames.shape[0] * videos.frames.shape[1]
        try:
            endpoint, answered = self.caller.call("/score", timeout, **content)
        except Refused as refused:
            if refused.status == CONFLICT:
                raise AnotherModel(f"{refused}; the service was started again with another reward model") from refused
            raise
        self._seconds.append(time.perf_counter() - started)
        try:
            answer = decode_answer(answered.content)
        except ProtocolError as error:
            return self._unusable(videos, endpoint.url, str(error))
        self._meant(endpoint.url, answer.digest)
        if (answer.name, answer.clips) != (request.name, request.clips):
            return self._unusable(videos, endpoint.url, "the answer is of other clips, or of these in another order")
        if set(answer.scores.values) != set(self.signals):
            return self._unusable(videos, endpoint.url, f"it scores {sorted(answer.scores.values)}")
        return only(answer.scores, self.signals)

    def _unusable(self, videos: VideoBatch, url: str, reason: str) -> Scores:
        say(f"reward service {url}: {len(videos)} clips without a score: {reason}")
        return without_scores(self.signals, len(videos))

    def unavailable(self) -> str | None:
        """None where a service is ready and all that are hold the model that is meant."""
        endpoints = self.caller.endpoints  # says what to install where httpx is missing
        import httpx

        reasons, ready = [], False
        for endpoint in endpoints:
            try:
                answer = endpoint.client.get("/ready", timeout=self.timeout_s)
                if answer.status_code != 200:
                    reasons.append(f"{endpoint.url} answers {answer.status_code}: {one_line(answer.text)[:300]}")
                    continue
                said = self._greet(endpoint.url, endpoint.client.get("/info", timeout=self.timeout_s))
                self._handshake, ready = self._handshake or said, True
            except httpx.RequestError as error:
                reasons.append(f"{endpoint.url}: {type(error).__name__}: {one_line(error)}")
            except ValueError as error:
                return one_line(error)
        return None if ready else "; ".join(reasons)

    def metrics(self) -> Mapping[str, float]:
        """Latencies and retries since it was last asked. Under ``time/``: two equal runs may differ in them."""
        waited, self._seconds = self._seconds, []
        retried, self.caller.retried = self.caller.retried, 0
        return {
            "time/reward_p50_s": quantile(waited, 0.5),
            "time/reward_p95_s": quantile(waited, 0.95),
            "time/reward_retries": float(retried),
        }

    def state_dict(self) -> dict:
        return {"digest": None if self._handshake is None else self._handshake.digest}

    def load_state_dict(self, state: dict) -> None:
        """Raises AnotherModel where the service no longer holds the model of the checkpoint."""
        if state["digest"] is not None and state["digest"] != self.handshake().digest:
            raise AnotherModel(
                f"the checkpoint was trained on the reward model {state['digest']}, but {', '.join(self.urls)} holds "
                f"{self.handshake().digest}; serve the first one again"
            )
