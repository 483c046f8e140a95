"""A reward in a process of its own scores what it would score here; where that process dies, nothing is made up."""

from collections.abc import Iterator

import pytest
import torch

from framework.conformance.scores import check_reward
from framework.interfaces import RewardFailed, RewardModel
from framework.types import VideoBatch
from rewards.composite import CompositeReward
from rewards.failure import Mask
from rewards.service.worker import WorkerReward
from tests.rewards.service.serving import clips, same
from tests.rewards.service.troubled import Trouble, Unbuildable
from tests.support import Brightness

EXPECTED = Brightness().score(clips(5))


def at(fps: float) -> VideoBatch:
    videos = clips(2)
    return VideoBatch(videos.frames, fps, videos.windows)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerReward]:
    reward = WorkerReward(Trouble(str(tmp_path_factory.mktemp("worker"))), threads=1)
    yield reward
    reward.close()


@pytest.mark.slow
def test_a_worker_scores_bit_for_bit_what_is_scored_here_in_any_order_of_memory(worker: WorkerReward) -> None:
    assert worker.signals == ("bright", "red") and worker.unavailable() is None
    assert same(worker.score(clips(5)), EXPECTED)
    turned = clips(5).frames.transpose(1, 2).contiguous().transpose(1, 2)
    here = Brightness().score(VideoBatch(turned, 8.0, clips(5).windows))
    assert same(worker.score(VideoBatch(turned, 8.0, clips(5).windows)), here)
    check_reward(worker, clips(3))


@pytest.mark.slow
def test_the_answer_to_a_question_that_was_interrupted_is_not_that_of_the_next(
    worker: WorkerReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    assert worker.unavailable() is None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("multiprocessing.connection.Connection.poll", interrupted)
        worker.score(clips(2))
    assert same(worker.score(clips(5)), EXPECTED)


@pytest.mark.slow
def test_what_the_reward_raises_is_raised_here_and_the_worker_goes_on(worker: WorkerReward) -> None:
    with pytest.raises(ValueError, match="one frame per second; is none") as caught:
        worker.score(at(1))
    assert not isinstance(caught.value, RewardFailed)
    with pytest.raises(RewardFailed, match="the reward worker: RuntimeError: no such kernel"):
        worker.score(at(2))
    assert same(worker.score(clips(5)), EXPECTED)


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again_once(worker: WorkerReward, capsys: pytest.CaptureFixture[str]) -> None:
    assert same(worker.score(at(4)), Brightness().score(at(4)))
    assert "has died (exit code 3); memory is the usual cause; it is started again" in capsys.readouterr().out
    with pytest.raises(RewardFailed, match="has died"):
        worker.score(at(3))
    assert same(worker.score(clips(5)), EXPECTED)


@pytest.mark.slow
def test_a_worker_ends_when_it_is_closed_and_where_it_takes_too_long(worker: WorkerReward) -> None:
    worker.score(clips(1))
    assert worker._worker is not None
    process = worker._worker.process
    worker.close()
    assert not process.is_alive() and process.exitcode == 0
    worker.timeout_s = 60.0
    worker.score(clips(1))
    worker.timeout_s = 0.2
    with pytest.raises(RewardFailed, match=r"does not answer within WorkerReward\.timeout_s=0\.2|not ready"):
        worker.score(at(5))
    worker.timeout_s = 60.0


@pytest.mark.slow
def test_a_reward_that_cannot_be_built_says_so_on_one_line() -> None:
    reason = WorkerReward(Unbuildable).unavailable()
    expected = "the reward of the worker cannot be built: ValueError: the weights are not there:; download them"
    assert reason == expected


def test_what_a_worker_cannot_do_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="WorkerReward cannot hold Mask"):
        WorkerReward(CompositeReward((Mask(Brightness()),)))
    with pytest.raises(ValueError, match=r"WorkerReward\.timeout_s and threads must be positive"):
        WorkerReward(Brightness(), timeout_s=0.0)
    model: RewardModel = Brightness()
    assert WorkerReward(model).state_dict() == {} and torch.get_num_threads() >= 1
