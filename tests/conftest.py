"""No test leaves a gin binding or a search path behind for the next one, none waits for a second thread, and Ctrl-C
reaches the tests of signals also where the shell that started them has it ignored.

What hypothesis draws is the same in every run, so that a red run says something about the change before it; other draws
are looked for with ``pytest --hypothesis-profile=explore``. No draw fails because a machine is slow.

Tensors here are tiny: a second thread gains nothing, and where another process holds its core, threads that spin at
every barrier make the suite ten times slower.
"""

import os
import signal
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest
import torch
from hypothesis import HealthCheck, settings

patient = settings(deadline=None, suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large))
settings.register_profile("same", patient, derandomize=True, database=None)
settings.register_profile("explore", patient)
settings.load_profile("same")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_configuration_outlives_a_test() -> Iterator[None]:
    """Restores ``sys.path``; fails a test after which gin still holds bindings."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    if "gin.config" in sys.modules:
        from gin import config as gin

        left = {**gin._CONFIG, **gin._OPERATIVE_CONFIG}
        gin.clear_config()
        assert not left, f"gin bindings left behind: {left}"
