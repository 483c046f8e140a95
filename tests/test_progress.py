"""Progress is for people at a terminal, and does not flood anybody else."""

import io
import sys

import pytest

from framework.reporting import progress as module
from framework.reporting.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("ARMILLARY_PROGRESS", raising=False)


def work(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert list(progress(range(5), "frames")) == [0, 1, 2, 3, 4]
        with progress(10, "training", done=4) as bar:
            for step in range(6):
                bar.update()
                bar.set_postfix(step=step)
    return stream.getvalue()


def test_a_terminal_sees_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = work(monkeypatch, Terminal())
    assert "frames: 100%" in shown and "training: 100%" in shown and "\r" in shown


def test_a_log_file_sees_nothing_of_short_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert work(monkeypatch, io.StringIO()) == ""


def lines_of_a_log(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[str]:
    """What a log file holds of a bar that is redrawn every second for 25 seconds and then closes."""
    stream, now = io.StringIO(), [0.0]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(module.time, "monotonic", lambda: now[0])
        log = module._LogLines(seconds)
        for now[0] in range(1, 26):
            log.write(f"\rtraining {now[0]:.0f}")
            log.flush()
        log.write("\n")
    return stream.getvalue().split("\n")


def test_a_log_file_sees_whole_lines_now_and_then_and_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of_a_log(monkeypatch, 10) == ["training 10", "training 20", "training 25", ""]
    assert len(lines_of_a_log(monkeypatch, 0)) == 26


def test_long_work_reaches_a_log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_SECONDS", 1e-9)
    shown = work(monkeypatch, io.StringIO())
    assert "\r" not in shown and "training: 100%" in shown and "10/10" in shown


@pytest.mark.parametrize(("name", "value"), [("RANK", "1"), ("ARMILLARY_PROGRESS", "0")])
def test_other_ranks_and_people_who_switch_it_off_see_nothing(monkeypatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert work(monkeypatch, Terminal()) == ""


def test_a_switch_that_is_neither_0_nor_1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMILLARY_PROGRESS", "off")
    with pytest.raises(ValueError, match="ARMILLARY_PROGRESS must be 0"):
        progress(3, "x")
