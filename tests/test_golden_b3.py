"""Golden cases of prompt switches follow their own hyper-parameters, and can fail."""

from dataclasses import replace

import pytest

from backbones.recache import BlockwiseRecache, JointRecache, MovedSinkRecache, NoRecache
from tests.golden import b3
from tests.golden.case import Case
from tests.golden.runner import KINDS, run_case
from tests.synthetic_switch import switch_case

LATER = {f"{kind}.{variant}" for kind in ("latents", "velocity") for variant in b3.VARIANTS}


def without_passes(case: Case) -> Case:
    """The case without the outputs of its recache passes, whose shape a planted error may change."""
    return replace(case, tensors={n: t for n, t in case.tensors.items() if not n.startswith("recache_velocity")})


def missed(case: Case) -> set[str]:
    return {row.tensor for row in run_case(case, KINDS["b3"]).misses}


SETTINGS = [
    ((2, 2, 2, 2, 2), (1000, 500), 1, 5, [6], 1),
    ((2, 2, 2, 2, 2), (1000, 500), 1, 5, [4], 1),  # nothing has left the window
    ((2, 2, 2, 2, 2), (1000, 500), 2, 6, [3, 7], 2),  # two switches, neither at a block's start
    ((3, 3, 3, 3), (1000, 600), 0, 7, [9], 1),  # no sink
    ((1, 2, 2, 2, 2), (1000, 500), 2, 5, [7], 1),  # a first block of its own length
    ((1, 1, 1, 1, 1, 1), (1000,), 2, 4, [1], 1),  # before the sink is whole
    ((2, 2, 2, 2, 2), (1000,), 3, 6, [4, 6, 8], 1),  # a recache of what a recache left, three times
]


@pytest.mark.parametrize(("lengths", "steps", "sink", "window", "switches", "batch"), SETTINGS)
def test_a_switch_of_another_setting_holds(lengths, steps, sink, window, switches, batch):
    case = switch_case(lengths, steps, sink, window, switches, batch)
    assert missed(case) == set()
    recached = {f"recache_velocity.{v}.{i}" for v in b3.VARIANTS for i in range(len(switches))}
    assert recached <= {row.tensor for row in run_case(case, KINDS["b3"]).rows}


@pytest.fixture(scope="module")
def case() -> Case:
    return switch_case((2, 2, 2, 2, 2), (1000, 500), 1, 5, [6], 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"switch_frames": [7]},
        {"switch_frames": [4]},
        {"sink_frames": 2},
        {"window_frames_including_current_block": 6},
    ],
)
def test_another_switch_sink_or_window_misses(case: Case, changed: dict):
    assert missed(replace(without_passes(case), hparams={**case.hparams, **changed})) == LATER


def test_a_switch_frame_inside_a_block_is_that_of_the_next_block(case: Case):
    assert missed(replace(case, hparams={**case.hparams, "switch_frames": [5]})) == set()


@pytest.mark.parametrize(
    ("kept", "moved"),
    [
        (NoRecache(), NoRecache()),
        (BlockwiseRecache(), BlockwiseRecache()),
        (MovedSinkRecache(), JointRecache()),
    ],
    ids=["none", "blockwise", "sinks confused"],
)
def test_another_recache_misses(monkeypatch, case: Case, kept, moved):
    monkeypatch.setitem(b3.VARIANTS, "keep_sink", kept)
    monkeypatch.setitem(b3.VARIANTS, "recache_sink", moved)
    assert missed(without_passes(case)) == LATER


def test_a_recache_of_another_length_is_refused(case: Case):
    with pytest.raises(ValueError, match="recache_frames"):
        run_case(replace(case, hparams={**case.hparams, "recache_frames": 3}), KINDS["b3"])


def test_a_switch_without_a_prompt_is_refused(case: Case):
    with pytest.raises(ValueError, match="need 1 switch_frames"):
        run_case(replace(case, hparams={**case.hparams, "switch_frames": [4, 6]}), KINDS["b3"])
