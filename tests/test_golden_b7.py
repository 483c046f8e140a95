"""Golden cases of adapters follow their own rank, alpha and targets, and can fail."""

from dataclasses import replace

import pytest

from tests.golden import b7
from tests.golden.case import Case
from tests.golden.runner import run_case
from tests.synthetic_lora import lora_case

ATTENTION = [f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"]


def missed(case: Case) -> set[str]:
    return {row.tensor for row in run_case(case, b7).misses}


@pytest.mark.parametrize(
    ("lengths", "rank", "alpha", "targets", "sink", "window", "batch"),
    [
        ((2, 2, 2), 2, 2, [*ATTENTION, "ffn.0", "ffn.2"], 0, None, 1),
        ((2, 2, 2), 3, 8, ["self_attn.q", "self_attn.v"], 0, None, 2),
        ((1, 2, 2), 4, 1, ["cross_attn.k", "cross_attn.o", "ffn.2"], 1, 4, 1),
        ((2, 2), 1, 0.5, ["ffn.0"], 0, None, 1),
        ((2, 2), 16, 32, ["q", "blocks.1.ffn.0"], 0, None, 1),
        ((2, 2), 2, 4, ["self_attn.k", "text_embedding.0", "time_embedding.2", "time_projection.1", "head.head"],
         0, None, 1),
    ],
)  # fmt: skip
def test_an_adapter_of_another_kind_holds(lengths, rank, alpha, targets, sink, window, batch):
    assert missed(lora_case(lengths, rank, alpha, targets, sink, window, batch)) == set()


@pytest.mark.parametrize("changed", [{"lora_alpha": 3}, {"lora_alpha": 2}])
def test_another_alpha_misses_what_the_adapter_gives_and_nothing_else(changed: dict):
    case = lora_case((2, 2), 3, 8, ["self_attn.q", "ffn.2"], 0, None)
    assert missed(case) == set()
    assert missed(replace(case, hparams={**case.hparams, **changed})) == {"probe_velocity_lora"}


def test_an_adapter_of_other_targets_than_the_case_says_is_refused():
    case = lora_case((2, 2), 3, 8, ["self_attn.q", "ffn.2"], 0, None)
    for wrong in ({"lora_targets": ["self_attn.q"]}, {"lora_targets": ["self_attn.q", "ffn.0"]}, {"lora_rank": 4}):
        with pytest.raises(ValueError, match=r"^b7_synthetic"):
            missed(replace(case, hparams={**case.hparams, **wrong}))
