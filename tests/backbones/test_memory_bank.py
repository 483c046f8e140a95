"""A bank keeps, per layer and clip, the frames that its prompt asks for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import backbones.memory_bank as memory_bank
from backbones.history import Memory
from backbones.memory_bank import MemoryBank, frame_scores
from tests.backbones.micro import (
    noise,
)
from tests.backbones.ways import gap
from tests.support import holds, refuted

# What the bank holds, told from scores alone

LAYERS = 2


def advance(bank: Memory, start: int, length: int, keys: Tensor, text: Tensor) -> Memory:
    """The bank after a block whose frame keys are [layers, rows, 1, 1, d]; text [layers, rows, d]."""
    kv = [(keys[layer][:, None].expand(-1, length, -1, -1, -1), torch.zeros(1)) for layer in range(LAYERS)]
    kv = [(k, k.clone()) for k, _ in kv]
    asked = [text[layer][:, None, None] for layer in range(LAYERS)]
    return bank.recall(asked).record(kv, start, lambda k, frame: k.clone())


def contents(rule: MemoryBank, block: int, scores: Sequence[float], blocks: int) -> list[list[int]]:
    """Bank ids that each block sees, where frame ``block · i`` has scores[i]."""
    bank, seen = rule.memory(), []
    text = torch.ones(LAYERS, 1, 1)
    for i in range(blocks):
        seen.append(bank.recall([t[:, None, None] for t in text]).frames)
        bank = advance(bank, block * i, block, torch.full((LAYERS, 1, 1, 1, 1), scores[i]), text)
    return [ids[0, 0].tolist() if ids.numel() else [] for ids in seen]


@pytest.mark.parametrize(
    ("interactive", "liked", "expected"),
    [
        (
            False,
            {15: 5.0, 27: 4.0, 24: 3.0},
            [
                [], [0], [3], [6], [6, 9], [6, 12], [6, 15], [6, 15, 18], [6, 15, 21], [6, 15, 24],
                [15, 24, 27], [15, 27, 30], [15, 27, 33],
            ],
        ),
        (
            True,
            {9: 5.0, 27: 4.0, 18: 3.0},
            [
                [], [0], [0], [0], [0, 9], [0, 9], [0, 9], [0, 9, 18], [0, 9, 18], [0, 9, 18],
                [9, 18, 27], [9, 27, 27],
            ],
        ),
    ],
    ids=["single", "interactive"],
)  # fmt: skip
def test_the_bank_of_the_released_sizes_holds_what_was_traced(interactive, liked, expected):
    scores = [liked.get(3 * i, 1.0) for i in range(len(expected))]
    assert contents(MemoryBank(interactive=interactive), 3, scores, len(expected)) == expected


@dataclass(frozen=True)
class Story:
    """Random keys of frames and text, rows that fork on the way, and a rule."""

    rule: MemoryBank
    blocks: int
    fork_at: int
    branches: int
    switch_at: int
    seed: int

    def keys(self, block: int, rows: int) -> Tensor:
        return noise(1000 * self.seed + block, LAYERS, rows, 1, 1, 4)

    @property
    def text(self) -> Tensor:
        return noise(1000 * self.seed + 999, LAYERS, 1, 4)


STORIES = st.builds(
    Story,
    rule=st.builds(MemoryBank, size=st.integers(1, 4), interval=st.integers(1, 3), interactive=st.booleans()),
    blocks=st.integers(4, 14),
    fork_at=st.integers(0, 8),
    branches=st.integers(1, 3),
    switch_at=st.integers(0, 14),
    seed=st.integers(0, 500),
)


def told(story: Story) -> list[list[list[list[int]]]]:
    """[block][layer][row] → ids, by lists of floats and nothing of the bank."""
    rows, table = 1, []
    slots: dict = {(layer, 0): [] for layer in range(LAYERS)}
    scores: dict = {}
    candidate, pointer, rule = None, 0, story.rule
    for block in range(story.blocks):
        if block == story.fork_at:
            slots = {
                (la, r * story.branches + b): list(v) for (la, r), v in slots.items() for b in range(story.branches)
            }
            scores = {
                (la, r * story.branches + b, f): v for (la, r, f), v in scores.items() for b in range(story.branches)
            }
            rows *= story.branches
        if candidate is not None:
            for key, held in slots.items():
                if pointer <= rule.size:
                    slots[key] = [*held[: pointer - 1], candidate]
                    continue
                worth = [0.0 if block == story.switch_at else scores[(*key, frame)] for frame in held]
                order = sorted(range(len(held)), key=lambda i, worth=worth: -worth[i])  # stable
                slots[key] = [*(held[i] for i in order[: rule.size - 1]), candidate]
        expected = -(-block // rule.interval)  # ⌈c/r⌉: what the rule of visibility says
        assert all(len(held) == min(expected, rule.size) for held in slots.values())
        table.append([[list(slots[layer, row]) for row in range(rows)] for layer in range(LAYERS)])
        if not rule.interactive or block % rule.interval == 0:
            candidate, pointer = 3 * block, block // rule.interval + 1
            keys = story.keys(block, rows)
            for layer in range(LAYERS):
                for row in range(rows):
                    scores[layer, row, candidate] = float((keys[layer, row, 0, 0] * story.text[layer, 0]).sum()) / 2
    return table


def check_contents(story: Story) -> None:
    bank: Memory = story.rule.memory()
    rows, expected = 1, told(story)
    text = [t[:, None, None] for t in story.text]
    for block in range(story.blocks):
        rows *= story.branches if block == story.fork_at else 1
        bank = bank.switched(None, rows) if block == story.switch_at else bank
        seen = bank.recall(text).frames
        for layer in range(LAYERS):
            for row in range(rows):
                found = seen[layer, row * seen.shape[1] // rows].tolist() if seen.numel() else []
                assert found == expected[block][layer][row]
        bank = advance(bank, 3 * block, 3, story.keys(block, rows), story.text)


def test_the_bank_keeps_the_best_frames_of_each_layer_and_row():
    holds(check_contents, STORIES, examples=60)


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("the worst frames are kept", lambda text, k: -frame_scores(text, k)),
        ("rows share a choice", lambda text, k: frame_scores(text, k).mean(0, keepdim=True).expand(len(k), -1)),
    ],
)
def test_the_contents_check_sees(monkeypatch: pytest.MonkeyPatch, name: str, planted: Callable):
    monkeypatch.setattr(memory_bank, "frame_scores", planted)
    refuted(check_contents, STORIES)


def test_a_score_is_the_mean_of_all_products_of_text_and_frame_keys():
    text, frames = noise(1, 2, 5, 3, 4), noise(2, 4, 3, 6, 3, 4)
    products = torch.einsum("plhd,pbnshd->pbnlsh", text, frames.unflatten(0, (2, 2))) / 4**0.5
    assert gap(frame_scores(text, frames), products.mean((3, 4, 5)).flatten(0, 1)) < 1e-12


def test_sizes_that_cannot_be_are_refused_in_one_line():
    for wrong in ({"size": 0}, {"interval": 0}, {"sink": 3, "window": 3}):
        with pytest.raises(ValueError, match=r"MemoryBank\.\w+ "):
            MemoryBank(**wrong)
