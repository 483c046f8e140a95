"""A first signal waits for the end of what is not to be torn, a second one does not, and nothing stays installed."""

import signal
import threading

import pytest

from framework.interruption import SIGNALS, Interruption, Stopped

CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_waits_for_the_end_of_a_block(number: int, code: int, capfd: pytest.CaptureFixture[str]):
    done = []
    with (
        pytest.raises(Stopped, match=f"by {number.name}, saved it; go on with: this") as stopped,
        Interruption("this") as stop,
    ):
        with stop.deferred():
            done.append("nothing came")
            assert not stop.poll()
        with stop.deferred():
            signal.raise_signal(number)
            done.append("the block goes on")
            stop.saved = "saved it"
            assert stop.poll()
        done.append("never")
    assert stopped.value.exit_code == code and done == ["nothing came", "the block goes on"]
    assert "once more stops at once" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), CODES)
def test_outside_of_such_a_block_it_acts_at_once(number: int, code: int):
    with pytest.raises(Stopped, match="nothing since the last checkpoint") as stopped, Interruption("this"):
        signal.raise_signal(number)
        raise AssertionError("not reached")
    assert stopped.value.exit_code == code


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt) as second, Interruption("this") as stop, stop.deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")
    assert not isinstance(second.value, Stopped)


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption("this") as stop, stop.deferred():
            signal.raise_signal(signal.SIGINT)
            assert not stop.poll()
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_inside_of_the_block_is_not_hidden_by_a_signal():
    with pytest.raises(FloatingPointError), Interruption("this") as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        stop.poll()
        raise FloatingPointError


def test_a_signal_that_came_after_the_poll_is_found_by_the_next_check():
    with pytest.raises(Stopped) as stopped, Interruption("this") as stop:
        with stop.deferred():
            assert not stop.poll()
            signal.raise_signal(signal.SIGTERM)
        stop.check()
        raise AssertionError("not reached")
    assert stopped.value.exit_code == 143


def test_all_processes_stop_when_one_has_seen_the_signal():
    elsewhere = iter([0, signal.SIGTERM])
    steps = []
    with pytest.raises(Stopped) as stopped, Interruption("this", agree=lambda seen: max(seen, next(elsewhere))) as stop:
        for step in range(9):
            with stop.deferred():
                steps.append(step)
                stop.poll()
    assert steps == [0, 1] and stopped.value.exit_code == 143


def test_a_thread_that_gets_no_signals_installs_nothing():
    def work() -> None:
        with Interruption("this") as stop, stop.deferred():
            seen.append([signal.getsignal(number) for number in SIGNALS])

    seen: list[list] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[signal.getsignal(number) for number in SIGNALS]]
