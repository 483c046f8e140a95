"""Whatever goes wrong between a run and its reward service, no score is made up: it is right, invalid, or an error."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from framework.interfaces import RewardFailed
from framework.serving.protocol import MEDIA_TYPE, Answer, Request, encode_request
from framework.serving.scoring import Busy
from framework.serving.service import RewardService, build_app
from framework.types import Scores, VideoBatch
from rewards.composite import CompositeReward
from rewards.failure import Mask, Raise, SkipComponent
from rewards.service.calling import Patience, Refused
from rewards.service.client import AnotherModel, HttpReward
from tests.rewards.service.serving import (
    PATIENT,
    PROBE,
    URL,
    Asgi,
    Clock,
    Counted,
    Fault,
    Faulty,
    Listening,
    changed,
    client,
    client_of,
    clips,
    free_port,
    httpx,
    same,
    service_of,
)
from tests.support import Brightness

EXPECTED = Brightness().score(clips(5))


def test_served_scores_are_those_of_the_model_bit_for_bit() -> None:
    with service_of() as service:
        reward, _ = client_of(service)
        assert reward.signals == ("bright", "red") and same(reward.score(clips(5)), EXPECTED)
        assert reward.unavailable() is None


@pytest.mark.parametrize(
    "fault",
    [500, 502, 503, 408, 429, httpx.ConnectError("refused"), httpx.ReadTimeout("hangs"),
     httpx.RemoteProtocolError("peer closed connection without sending complete message body")],
    ids=str,
)  # fmt: skip
def test_what_may_pass_is_tried_again_with_growing_pauses(fault: Fault) -> None:
    clock = Clock()
    with service_of() as service:
        reward, transport = client_of(service, [fault] * 3, clock=clock, patience=PATIENT)
        assert same(reward.score(clips(5)), EXPECTED)
        assert transport.asked == 4 and clock.pauses == [1.0, 2.0, 4.0]
        assert reward.metrics()["time/reward_retries"] == 3 and reward.metrics()["time/reward_retries"] == 0


@pytest.mark.parametrize("fault", [500, 429, httpx.ReadTimeout("hangs")], ids=str)
def test_what_does_not_pass_is_an_error_of_one_line_after_four_more_attempts(fault: Fault) -> None:
    with service_of() as service:
        reward, transport = client_of(service, [fault] * 9)
        with pytest.raises(RewardFailed, match=r"one\.test.*attempt 5") as caught:
            reward.score(clips(5))
        assert transport.asked == 5 and "\n" not in str(caught.value)


def test_a_busy_service_says_when_to_come_back_and_the_pauses_are_jittered() -> None:
    clock = Clock()
    with service_of() as service:
        reward, transport = client_of(service, [429, 500], clock=clock, jitter=0.0, patience=PATIENT)
        transport.retry_after = "7"
        assert same(reward.score(clips(5)), EXPECTED) and clock.pauses == [7.0, 1.0]


def test_the_deadline_ends_retries_before_they_are_used_up() -> None:
    clock = Clock()
    with service_of() as service:
        patience = Patience(backoff_s=10.0, deadline_s=25.0)
        reward, transport = client_of(service, [500] * 9, clock=clock, patience=patience)
        with pytest.raises(RewardFailed, match="attempt 2, after 10 s"):
            reward.score(clips(5))
        assert transport.asked == 2


class Drip(httpx.SyncByteStream):
    """An answer of which a byte comes every second, and never the last."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.clock.sleep(1.0)
            yield b"."


def test_an_answer_that_trickles_in_is_too_late_like_one_that_never_comes() -> None:
    clock = Clock()
    with service_of() as service:
        patience = Patience(backoff_s=0.0, retries=1)
        drip: Fault = lambda _: httpx.Response(200, stream=Drip(clock))  # noqa: E731
        reward, transport = client_of(service, [drip] * 9, clock=clock, patience=patience, timeout_s=20.0)
        with pytest.raises(RewardFailed, match=r"not complete after .* \(attempt 2, after 4\d s\)"):
            reward.score(clips(1))
        assert transport.asked == 2


def test_an_answer_that_cannot_be_unpacked_is_asked_for_again() -> None:
    with service_of() as service:
        broken: Fault = lambda _: httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Raw())  # noqa: E731
        reward, transport = client_of(service, [broken], patience=Patience(backoff_s=0.0))
        assert same(reward.score(clips(5)), EXPECTED) and transport.asked == 2


class Raw(httpx.SyncByteStream):
    """No gzip."""

    def __iter__(self) -> Iterator[bytes]:
        yield b"abcd"


@pytest.mark.parametrize("status", [400, 401, 404, 413, 415, 422])
def test_what_is_wrong_with_the_request_is_not_tried_again(status: int) -> None:
    with service_of() as service:
        reward, transport = client_of(service, [status])
        with pytest.raises(Refused, match=f"answers {status}"):
            reward.score(clips(5))
        assert transport.asked == 1


def test_what_the_reward_says_of_the_clips_reaches_the_run() -> None:
    class Picky(Brightness):
        def score(self, videos: VideoBatch) -> Scores:
            if videos.fps != 16:
                raise ValueError("Picky wants 16 fps\nchange the recipe")
            return super().score(videos)

    with service_of(Picky()) as service:
        reward, transport = client_of(service)
        with pytest.raises(Refused, match="answers 422: Picky wants 16 fps; change the recipe"):
            Mask(reward).score(clips(2))
        assert transport.asked == 1


# answers that cannot be believed


def without_last(answer: Answer) -> Answer:
    scores = answer.scores
    shorter = Scores({n: v[:-1] for n, v in scores.values.items()}, {n: v[:-1] for n, v in scores.valid.items()})
    return replace(answer, clips=answer.clips[:-1], scores=shorter)


def truncated(response: httpx.Response) -> httpx.Response:
    return httpx.Response(200, content=response.content[:-3])


UNUSABLE: dict[str, Callable[[httpx.Response], httpx.Response]] = {
    "wrong length": changed(without_last),
    "reordered": changed(lambda a: replace(a, clips=a.clips[::-1])),
    "of another request": changed(lambda a: replace(a, name="other", clips=tuple(f"{c}x" for c in a.clips))),
    "other signals": changed(lambda a: replace(a, scores=Scores.of({"bright": a.scores.values["bright"]}))),
    "truncated": truncated,
    "empty": lambda response: httpx.Response(200, content=b""),
    "html": lambda response: httpx.Response(200, content=b"<html>a proxy's login page</html>"),
}


@pytest.mark.parametrize("fault", UNUSABLE.values(), ids=list(UNUSABLE))
def test_an_answer_that_is_not_of_the_clips_leaves_them_without_a_score(fault: Fault) -> None:
    with service_of() as service:
        reward, _ = client_of(service, [fault])
        scores = reward.score(clips(5))
        for name in reward.signals:
            assert not bool(scores.valid[name].any()) and bool(scores.values[name].isnan().all())
        assert same(reward.score(clips(5)), EXPECTED), "the next one is asked as ever"


def test_a_score_that_is_not_finite_is_invalid_and_its_siblings_keep_theirs() -> None:
    def spoil(answer: Answer) -> Answer:
        values = {name: value.clone() for name, value in answer.scores.values.items()}
        values["red"][2], values["bright"][0] = torch.nan, torch.inf
        return replace(answer, scores=Scores(values, {n: torch.isfinite(v) for n, v in values.items()}))

    with service_of() as service:
        scores = client_of(service, [changed(spoil)])[0].score(clips(5))
        assert scores.valid["red"].tolist() == [True, True, False, True, True]
        assert scores.valid["bright"].tolist() == [False, True, True, True, True]
        assert bool(scores.values["red"][2].isnan()) and bool(scores.values["bright"][0].isnan())
        assert torch.equal(scores.values["red"][3:], EXPECTED.values["red"][3:])


def test_the_validity_check_would_see_a_client_that_believes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def believing(self: HttpReward, videos: VideoBatch, url: str, reason: str) -> Scores:
        return Scores.of({name: torch.zeros(len(videos)) for name in self.signals})

    monkeypatch.setattr(HttpReward, "_unusable", believing)
    with pytest.raises(AssertionError):
        test_an_answer_that_is_not_of_the_clips_leaves_them_without_a_score(UNUSABLE["reordered"])


# another model


def test_a_service_that_comes_back_with_another_model_ends_the_run_whatever_its_policy() -> None:
    for policy in (lambda reward: reward, Mask):
        with service_of(Counted("first")) as first, service_of(Counted("second")) as second:
            transport = Faulty(Asgi(build_app(first)), [])
            reward = policy(client({URL: transport}))
            assert same(reward.score(clips(5)), EXPECTED)
            transport.inner = Asgi(build_app(second))
            with pytest.raises(AnotherModel, match="another reward model"):
                reward.score(clips(5))


def test_an_answer_of_another_model_is_refused_even_where_the_service_does_not_mind() -> None:
    with service_of() as service:
        reward, _ = client_of(service, [changed(lambda a: replace(a, digest="other"))])
        with pytest.raises(AnotherModel, match="digest other, not"):
            reward.score(clips(2))


def test_a_checkpoint_holds_the_digest_and_a_run_goes_on_with_that_model_only() -> None:
    with service_of(Counted("first")) as first, service_of(Counted("second")) as second:
        started, _ = client_of(first)
        started.score(clips(2))
        state = started.state_dict()
        client_of(first)[0].load_state_dict(state)
        with pytest.raises(AnotherModel, match="the checkpoint was trained on the reward model"):
            client_of(second)[0].load_state_dict(state)
        pinned, _ = client_of(second, model_digest=first.digest)
        assert "another reward model" in str(pinned.unavailable())
        with pytest.raises(AnotherModel):
            pinned.score(clips(1))


@pytest.mark.parametrize("same_model", [True, False])
def test_a_service_that_is_started_again_between_two_attempts(same_model: bool) -> None:
    with service_of(Counted("a")) as first, service_of(Counted("a" if same_model else "b")) as second:
        transport = Faulty(Asgi(build_app(first)), [])

        def restart() -> None:
            transport.inner = Asgi(build_app(second))

        reward = client({URL: transport}, Clock(during=restart))
        reward.score(clips(1))
        transport.faults = [httpx.ConnectError("refused")]
        if same_model:
            assert same(reward.score(clips(5)), EXPECTED)
        else:
            with pytest.raises(AnotherModel, match="started again with another reward model"):
                reward.score(clips(5))


# several clients, several services


def test_two_clients_get_their_own_scores_out_of_common_batches() -> None:
    model = Counted()
    with service_of(model, wait_s=0.2) as service:
        rewards = [client_of(service)[0] for _ in range(2)]
        for reward in rewards:
            reward.handshake()
        model.batches.clear()
        with ThreadPoolExecutor(2) as threads:
            scored = list(threads.map(lambda i: rewards[i].score(clips(3 + i, seed=i)), range(2)))
        assert all(same(scores, Brightness().score(clips(3 + i, seed=i))) for i, scores in enumerate(scored))
        assert model.batches == [7], "both were scored at once"


def test_clips_are_cut_into_requests_and_services_asked_in_turn_without_changing_the_order() -> None:
    with service_of() as one, service_of() as two:
        transports = {f"http://{n}.test": Faulty(Asgi(build_app(s)), []) for n, s in (("one", one), ("two", two))}
        reward = client(transports)
        reward.megabytes = 1
        big = VideoBatch(torch.randint(256, (6, 3, 3, 340, 340), dtype=torch.uint8), 8.0, clips(6).windows)
        assert same(reward.score(big), Brightness().score(big))
        assert [transport.asked for transport in transports.values()] == [3, 3]


def test_a_broken_service_is_left_alone_for_a_while_and_then_tried_again() -> None:
    clock = Clock()
    with service_of() as service:
        app = Asgi(build_app(service))
        broken, sound = Faulty(app, [500] * 3), Faulty(app, [])
        reward = client(
            {"http://a.test": broken, "http://b.test": sound}, clock, patience=Patience(backoff_s=1.0, breaker_s=30.0)
        )
        for seed in range(12):
            assert same(reward.score(clips(2, seed)), Brightness().score(clips(2, seed)))
        assert broken.asked == 3, "three failures close it"
        clock.pauses.append(31.0)
        for seed in range(4):
            reward.score(clips(2, seed))
        assert broken.asked == 5


# the service itself


def test_a_request_that_comes_twice_is_scored_once_but_a_clip_without_a_score_again() -> None:
    pixel = int(clips(3).frames[1, 0, 0, 0, 0])
    model = Counted()
    with service_of(model) as service:
        reward, _ = client_of(service)
        first = reward.score(clips(3))
        assert same(reward.score(clips(3)), first) and len(model.batches) == 2, "the self-test and one batch"
        model.failing = (pixel,)
        assert same(reward.score(clips(3)), first)
        other = replace(clips(3), fps=9.0)
        assert reward.score(other).valid["red"].tolist() == [True, False, True]
        model.failing = ()
        assert bool(reward.score(other).valid["red"].all())


class Stuck(Brightness):
    """Scores only once it is let go."""

    def __init__(self) -> None:
        self.go, self.started, self.count = threading.Event(), threading.Event(), 0
        self.go.set()

    def score(self, videos: VideoBatch) -> Scores:
        self.count += 1
        self.started.set()
        assert self.go.wait(10)
        return super().score(videos)


def test_a_full_queue_sends_away_with_the_time_to_come_back_and_health_still_answers() -> None:
    model = Stuck()
    with service_of(model, waiting=1) as service:
        model.go.clear()
        model.started.clear()
        app = Asgi(build_app(service))
        first = service.queue.submit(Request.of(clips(1, 1), service.digest))
        assert model.started.wait(10)
        second = service.queue.submit(Request.of(clips(1, 2), service.digest))
        with pytest.raises(Busy):
            service.queue.submit(Request.of(clips(1, 3), service.digest))
        with httpx.Client(base_url=URL, transport=app) as plain:
            content = encode_request(Request.of(clips(1, 3), service.digest))
            refused = plain.post("/score", content=content, headers={"Content-Type": MEDIA_TYPE})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert plain.get("/health").json() == {"status": "ok"} and plain.get("/ready").json() == {"ready": True}
        model.go.set()
        assert first.result(10).scores.values.keys() == second.result(10).scores.values.keys()


def test_a_client_that_gave_up_waiting_finds_its_first_question_answered() -> None:
    model = Stuck()
    with service_of(model) as service:
        listening = Listening(service, free_port())
        reward = HttpReward([f"http://127.0.0.1:{listening.port}"], timeout_s=1.0, timeout_per_frame_s=0.0)
        reward.handshake()
        model.go.clear()
        reward.wire = replace(reward.wire, sleep=lambda seconds: model.go.set())
        reward.caller.wire = reward.wire
        try:
            assert same(reward.score(clips(5)), EXPECTED)
            assert model.count == 2, "the self-test and one batch, although it was asked for twice"
            assert reward.metrics()["time/reward_retries"] >= 1
        finally:
            listening.stop()


def test_only_those_who_bring_the_token_are_answered(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("0123456789abcdef\n")
    wrong.write_text("0123456789abcdeg\n")
    with service_of() as service:
        app = Asgi(build_app(service, "0123456789abcdef"))
        assert same(client({URL: app}, token_file=str(right)).score(clips(5)), EXPECTED)
        for options in ({}, {"token_file": str(wrong)}):
            with pytest.raises(Refused, match="answers 401: the token is missing or wrong"):
                client({URL: app}, **options).score(clips(5))
        with httpx.Client(base_url=URL, transport=app) as plain:
            paths = {path: plain.get(path).status_code for path in ("/health", "/ready", "/info", "/metrics", "/docs")}
            assert paths == {"/health": 200, "/ready": 401, "/info": 401, "/metrics": 401, "/docs": 401}
    (tmp_path / "short").write_text("secret")
    for file, said in (("short", "at least 16"), ("missing", "cannot be read")):
        with pytest.raises(ValueError, match=said):
            client({URL: app}, token_file=str(tmp_path / file)).score(clips(1))


def test_requests_that_are_too_large_of_another_type_or_no_requests_are_refused() -> None:
    with service_of(megabytes=1) as service, httpx.Client(base_url=URL, transport=Asgi(build_app(service))) as plain:
        kind = {"Content-Type": MEDIA_TYPE}
        assert plain.post("/score", content=b"x" * (2**20 + 1), headers=kind).status_code == 413
        assert plain.post("/score", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415
        assert plain.post("/score", content=b"x", headers=kind).status_code == 400
        other = encode_request(Request.of(clips(1), "other"))
        assert plain.post("/score", content=other, headers=kind).status_code == 409
        assert plain.get("/docs").status_code == plain.get("/openapi.json").status_code == 404


def test_a_service_tells_what_it_is_and_how_it_does() -> None:
    class Detailed(Counted):
        def details(self) -> dict[str, str]:
            return {"attention": "sdpa", "dtype": "float32"}

    with service_of(Detailed(failing=(int(clips(3).frames[0, 0, 0, 0, 0]),))) as service:
        reward, _ = client_of(service)
        reward.score(clips(3))
        with httpx.Client(base_url=URL, transport=Asgi(build_app(service))) as plain:
            info = plain.get("/info").json()
            assert (info["signals"], info["digest"]) == (["bright", "red"], service.digest)
            assert info["details"] == {"attention": "sdpa", "dtype": "float32"}
            assert info["counts"]["clips"] == 4 and info["counts"]["invalid_clips"] == 1
            assert 0 < info["counts"]["latency_p50_s"] <= info["counts"]["latency_p95_s"]
            assert "armillary_reward_latency_p95_s 0." in plain.get("/metrics").text


def test_a_service_that_no_longer_gives_the_score_of_its_self_test_is_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("framework.serving.service.RETEST_S", -1.0)
    model = Counted()
    with service_of(model) as service:
        reward, _ = client_of(service)
        assert reward.unavailable() is None
        model.failing = tuple(range(256))
        assert "the self-test gives bright=nan" in str(reward.unavailable())


def test_a_service_in_the_middle_of_a_long_batch_says_at_once_that_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    going, done = threading.Event(), threading.Event()

    class Long(Counted):
        def score(self, videos: VideoBatch) -> Scores:
            if len(videos) > 1:
                going.set()
                assert done.wait(10)
            return super().score(videos)

    with service_of(Long()) as service:
        monkeypatch.setattr("framework.serving.service.RETEST_S", 0.0)
        answer = service.queue.submit(Request.of(clips(2), service.digest))
        assert going.wait(10)
        try:
            assert asyncio.run(asyncio.wait_for(service.unready(), 5)) is None
        finally:
            done.set()
        assert len(answer.result(10).clips) == 2


def test_rewards_that_cannot_score_the_self_test_or_remember_are_not_served() -> None:
    with pytest.raises(ValueError, match="no score in every signal"), service_of(Counted(failing=tuple(range(256)))):
        pass
    with pytest.raises(ValueError, match="remembers what it has seen"), service_of(Mask(Brightness())):
        pass

    class Broken(Brightness):
        def score(self, videos: VideoBatch) -> Scores:
            raise RuntimeError("no such\nkernel")

    said = "Broken cannot score the clip of the self-test: no such; kernel"
    with pytest.raises(ValueError, match=said), service_of(Broken()):
        pass


def test_a_failure_policy_is_not_served_since_nobody_would_ask_it() -> None:
    for model in (Raise(Brightness()), SkipComponent(Brightness()), CompositeReward((SkipComponent(Brightness()),))):
        with pytest.raises(ValueError, match="put the policy around the client"):
            RewardService(model, PROBE)
    with service_of(CompositeReward((Brightness(),))) as service:
        assert service.queue.alive


def test_nobody_at_the_port_is_said_before_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = HttpReward([f"http://127.0.0.1:{free_port()}"], timeout_s=20.0)
    monkeypatch.setattr(Patience, "pause", lambda *_: pytest.fail("it is asked once more"))
    assert "ConnectError" in str(reward.unavailable())
    with pytest.raises(ValueError, match=r"HttpReward\.urls must list services"):
        HttpReward(["127.0.0.1:8100"])
    with service_of() as service:
        wrong, _ = client_of(service, names=("VQ",))
        assert "not HttpReward.names=['VQ']" in str(wrong.unavailable())
    assert PROBE.videos().frames.float().std() > 0
