"""Several regularizers add up, ask for what any of them reads, and only the one that marks sees the marks."""

import pytest
import torch
from hypothesis import strategies as st

from framework.records import AnchorShift, EndpointShift
from framework.types import Marks, Objective, Scores
from strategies.regularizers.anchor_velocity import AnchorVelocityKL
from strategies.regularizers.selective_kl import SelectiveKL
from strategies.regularizers.several import Several
from strategies.regularizers.velocity_kl import VelocityKL
from tests.support import close, normal, over


def objective(seed: int) -> Objective:
    written = {EndpointShift: EndpointShift(normal(seed, 6).square()), AnchorShift: AnchorShift(normal(seed + 1, 6))}
    return Objective(torch.zeros(6), written)


@over(st.integers(0, 1000))
def test_penalties_add_up_and_marks_reach_only_the_part_that_made_them(seed: int):
    selective, uniform, anchor = SelectiveKL("a", ["b"], 0.3), VelocityKL(0.2), AnchorVelocityKL(0.1)
    given, marks = objective(seed), (normal(seed + 2, 6) > 0).double()
    expected = selective.penalty(given, marks) + uniform.penalty(given, None) + anchor.penalty(given, None)
    close(Several([uniform, selective, anchor]).penalty(given, marks), expected, atol=1e-12)
    lost = [part.penalty(given, marks) for part in (uniform, selective, anchor)]  # a planted error: marks for all
    if bool((marks == 0).any()):
        assert not torch.allclose(torch.stack(lost).sum(0), expected)


def test_it_asks_for_everything_that_a_part_asks_for():
    parts = Several([SelectiveKL("a", ["b"]), AnchorVelocityKL()])
    assert parts.reads == {EndpointShift, AnchorShift}
    assert parts.views == {"current", "reference"} and parts.signals == {"a", "b"}


def test_it_remembers_what_its_parts_remember():
    scores, groups = Scores.of({"a": normal(0, 8), "b": normal(1, 8)}), torch.arange(8) // 4
    one, other = (Several([VelocityKL(), SelectiveKL("a", ["b"])]) for _ in range(2))
    for _ in range(3):
        one.prepare(scores, groups)
    other.load_state_dict(one.state_dict())
    left, right = one.prepare(scores, groups), other.prepare(scores, groups)
    assert isinstance(left, Marks) and isinstance(right, Marks)
    assert torch.equal(left.per_clip, right.per_clip) and left.metrics == right.metrics


def test_two_parts_that_mark_and_no_part_at_all_are_refused():
    with pytest.raises(ValueError, match=r"Several\.parts has 2 that mark clips \(SelectiveKL, SelectiveKL\)"):
        Several([SelectiveKL("a", ["b"]), SelectiveKL("b", ["a"])])
    with pytest.raises(ValueError, match=r"Several\.parts is empty"):
        Several([])
