"""No test leaves a gin binding or a search path behind for the next one."""

import sys
from collections.abc import Iterator

import pytest


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
