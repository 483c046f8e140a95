"""Rows of one batch may see different frames: what each reads, where it stands and what it says are its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones import streaming
from backbones.history import FullHistory, HistoryPolicy, KVHistory, SinkWindow
from backbones.streaming import WanStream, rows_of_text
from backbones.visible import VisibleKV
from framework.types import Visible
from tests.backbones.micro import LATENT, PROMPTS, MicroGenerator, micro_generator, micro_network, noise
from tests.backbones.oracle import Frame, dense_forward
from tests.backbones.ways import ATOL, SEEN, gap
from tests.support import holds, refuted

LAYERS = 2


# Reading: a list of frames per row


class Stored:
    """A history, and every frame of it as each current row has it: the slow way, a full copy per branch."""

    def __init__(self, history: KVHistory, rows: dict[int, list[tuple[Tensor, Tensor]]]) -> None:
        self.history = history
        self.rows = rows  # by frame id, per layer [N, S, heads, d]


@st.composite
def histories(draw) -> Stored:
    """Chunks of one to three frames, with forks between them."""
    batch, seed = draw(st.integers(1, 2)), 0
    history = KVHistory()
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
    actions = draw(st.lists(st.sampled_from(["commit", "commit", "fork"]), min_size=2, max_size=6))
    for action in (*actions, "commit"):
        if action == "fork" and batch < 5:
            branches = draw(st.integers(1, 3))
            history, batch = history.fork(branches), batch * branches
            rows = {
                f: [(k.repeat_interleave(branches, 0), v.repeat_interleave(branches, 0)) for k, v in layers]
                for f, layers in rows.items()
            }
        else:
            length, first = draw(st.integers(1, 3)), history.next_frame
            seed += 10
            kv = [
                (noise(seed + i, batch, length, 2, 1, 2), noise(seed + 5 + i, batch, length, 2, 1, 2)) for i in (0, 1)
            ]
            history = history.commit(kv)
            rows |= {first + j: [(k[:, j], v[:, j]) for k, v in kv] for j in range(length)}
    return Stored(history, rows)


@st.composite
def asked(draw, stored: Stored) -> tuple[list[int], list[tuple[int, ...]]]:
    """(rows of the batch, what each of them sees)."""
    total, ids = len(next(iter(stored.rows.values()))[0][0]), sorted(stored.rows)
    rows = sorted(draw(st.sets(st.integers(0, total - 1), min_size=1)))
    count = draw(st.integers(1, min(5, len(ids))))
    routes = st.lists(st.sampled_from(ids), min_size=count, max_size=count, unique=True).map(lambda f: tuple(sorted(f)))
    return rows, [draw(routes) for _ in rows]


@st.composite
def reads(draw) -> tuple[Stored, list[int], list[tuple[int, ...]]]:
    stored = draw(histories())
    return stored, *draw(asked(stored))


def check_read(read: tuple[Stored, list[int], list[tuple[int, ...]]], which: type[KVHistory] = KVHistory) -> None:
    """Row by row and frame by frame what that row has committed."""
    stored, rows, frames = read
    total = len(next(iter(stored.rows.values()))[0][0])
    view = which(stored.history.chunks, stored.history.branches).route(frames, rows, total)
    assert len(view) == len(frames[0])
    for layer in range(LAYERS):
        for part, found in enumerate(view.read(layer)):
            expected = [
                torch.stack([stored.rows[f][layer][part][row] for f in line])
                for row, line in zip(rows, frames, strict=True)
            ]
            assert torch.equal(found, torch.stack(expected))


class BranchesLast(KVHistory):
    """A planted error: row r is taken to belong to trunk row r mod P, not r // B."""

    def route(self, frames: Sequence[Sequence[int]], rows: Sequence[int], total: int) -> VisibleKV:
        prompts = total // max(self.branches)
        turned = [(row % prompts) * (total // prompts) + row // prompts for row in rows]
        return super().route(frames, turned, total)


class FirstRowsFrames(KVHistory):
    """A planted error: all rows are shown what the first one is."""

    def route(self, frames: Sequence[Sequence[int]], rows: Sequence[int], total: int) -> VisibleKV:
        return super().route([frames[0]] * len(frames), rows, total)


class RowsForgotten(KVHistory):
    """A planted error: a part of the batch reads the first rows."""

    def route(self, frames: Sequence[Sequence[int]], rows: Sequence[int], total: int) -> VisibleKV:
        return super().route(frames, range(len(rows)), total)


def test_every_row_reads_its_own_frames_across_forks():
    holds(check_read, reads(), examples=120)


@pytest.mark.parametrize("planted", [BranchesLast, FirstRowsFrames, RowsForgotten])
def test_the_reading_check_sees_other_rows_and_other_frames(planted: type[KVHistory]):
    refuted(lambda read: check_read(read, planted), reads(), examples=200)


def test_a_frame_that_is_gone_and_rows_of_unequal_length_are_refused():
    history = KVHistory()
    for seed in range(5):
        kv = [(noise(seed, 2, 1, 2, 1, 2), noise(seed, 2, 1, 2, 1, 2))]
        history = history.commit(kv, SinkWindow(1, 3))
    for missing in (1, 5):
        with pytest.raises(KeyError, match=rf"frames \[{missing}\] are not in the history"):
            history.route([(0, 4), (0, missing)], (0, 1), 2)
    with pytest.raises(ValueError, match="equally many frames"):
        history.route([(0, 4), (0,)], (0, 1), 2)


def test_routed_views_copy_no_chunk_and_share_what_all_rows_see():
    history = KVHistory().commit([(noise(1, 1, 6, 2, 1, 2), noise(2, 1, 6, 2, 1, 2))]).fork(4)
    view = history.route([(0, 1, i, 5) for i in range(2, 5)] + [(0, 1, 2, 5)], range(4), 4)
    assert view.chunks is history.chunks
    assert [type(piece).__name__ for piece in view.pieces] == ["Run", "Gather", "Run"]


@pytest.mark.parametrize("resident", [0, 3, 5, 20])
def test_resident_frames_stay_beside_what_the_policy_shows(resident: int):
    policy, history = SinkWindow(2, 5), KVHistory()
    for seed in range(9):
        history = history.commit([(noise(seed, 1, 2, 2, 1, 2), noise(seed, 1, 2, 2, 1, 2))], policy, resident)
    kept = {
        f for c in range(0, 18, 2) for f in (c, c + 1)
        if any(i < 2 or i > 18 - 3 or i >= 18 - resident for i in (c, c + 1))
    }  # fmt: skip
    assert set(history.frame_ids) == kept


# Asking: rows of different visible length in one call


POLICIES: dict[str, HistoryPolicy] = {
    "absolute": SinkWindow(1, 5),
    "relative": SinkWindow(1, 5, relative=True),
    "everything": FullHistory(),
}
BLOCK = 2


@dataclass(frozen=True)
class Situation:
    """Clips of P prompts with B branches: a prefix shared by the branches, blocks of their own, then a question."""

    prompts: int
    branches: int
    prefix: int
    own: int
    seed: int
    visible: tuple[tuple[int, ...] | None, ...]

    @property
    def clips(self) -> int:
        return self.prompts * self.branches

    @property
    def start(self) -> int:
        return BLOCK * (self.prefix + self.own)

    def latents(self) -> tuple[Tensor, Tensor]:
        """(clean frames of every clip, the noisy block)."""
        channels, height, width = LATENT
        trunk = noise(self.seed, self.prompts, channels, BLOCK * self.prefix, height, width)
        own = noise(self.seed + 1, self.clips, channels, BLOCK * self.own, height, width)
        clean = torch.cat([trunk.repeat_interleave(self.branches, 0), own], 2)
        return clean, noise(self.seed + 2, self.clips, channels, BLOCK, height, width)

    def stream(self, generator: MicroGenerator) -> WanStream:
        clean, _ = self.latents()
        stream = generator.open(PROMPTS[: self.prompts], resident=self.start)
        for i, block in enumerate(clean.split(BLOCK, dim=2)):
            if i == self.prefix:
                stream = generator.fork(stream, self.branches)
            stream = generator.commit(block[:: self.branches] if i < self.prefix else block, stream)
        return stream


@st.composite
def situations(draw) -> Situation:
    prompts, branches = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    prefix, own = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    ids = range(BLOCK * (prefix + own))
    routes = st.none() | st.sets(st.sampled_from(ids), min_size=1, max_size=4).map(lambda f: tuple(sorted(f)))
    visible = tuple(draw(routes) for _ in range(prompts * branches))
    return Situation(prompts, branches, prefix, own, draw(st.integers(0, 999)), visible)


def answer(case: Situation, policy: HistoryPolicy, commit: bool = False) -> Tensor:
    """The block asked once for all rows, or committed and read back: K of the last layer."""
    generator = micro_generator(policy, BLOCK)
    stream, (_, x) = case.stream(generator), case.latents()
    if commit:
        return generator.commit(x, stream, case.visible).history.chunks[-1].kv[-1][0]
    return generator.predict(x, 0.5, stream, case.visible)


def each_alone(case: Situation, policy: HistoryPolicy, commit: bool = False) -> Tensor:
    """All rows are shown what row r sees; row r of the answer."""
    rows = [answer(replace(case, visible=(v,) * case.clips), policy, commit)[r] for r, v in enumerate(case.visible)]
    return torch.stack(rows)


def densely(case: Situation, policy: HistoryPolicy) -> Tensor:
    """The oracle: one masked forward per row over [all clean frames | the block]."""
    weights = dict(micro_network().named_parameters())
    clean, x = case.latents()
    text = micro_generator(policy, BLOCK).encode_text(PROMPTS[: case.prompts]).repeat_interleave(case.branches, 0)
    sink, window, relative = 0, None, False
    if isinstance(policy, SinkWindow):
        sink, window, relative = policy.sink, policy.window, policy.relative
    frames = [Frame(f, f // BLOCK * BLOCK, f // BLOCK * BLOCK + BLOCK, True) for f in range(case.start)]
    frames += [Frame(f, case.start, case.start + BLOCK, False) for f in range(case.start, case.start + BLOCK)]
    times = torch.tensor([[0.0] * case.start + [500.0] * BLOCK], dtype=torch.float64)
    rows = []
    for r, shown in enumerate(case.visible):
        sequence = torch.cat([clean[r : r + 1], x[r : r + 1]], 2)
        out = dense_forward(
            weights, 2, sequence, times, text[r : r + 1], frames, sink, window, relative,
            shown=None if shown is None else frozenset(shown),
        )  # fmt: skip
        rows.append(out[0, :, case.start :])
    return torch.stack(rows)


def check_rows_are_themselves(case: Situation) -> None:
    for policy in POLICIES.values():
        with torch.no_grad():
            together = answer(case, policy)
            assert gap(together, each_alone(case, policy)) < ATOL[torch.float64]
            assert gap(together, densely(case, policy)) < ATOL[torch.float64]
            written = answer(case, policy, commit=True)
            assert gap(written, each_alone(case, policy, commit=True)) < ATOL[torch.float64]


def test_rows_that_see_different_frames_answer_as_each_would_alone():
    holds(check_rows_are_themselves, situations(), examples=12)


MIXED = Situation(2, 3, 2, 1, 3, ((0, 3), None, (1, 2), (0, 1, 2, 4), (2, 5), None))
"""Two prompts with unequal shares of each visible length, ids from before the fork and after it."""


def test_a_mixed_batch_answers_as_the_dense_mask():
    check_rows_are_themselves(MIXED)


class Deaf(VisibleKV):
    """A planted error: rows that differ in their positions all stand where the first one does."""

    positions = property(lambda self: None, lambda self, value: None)  # pyright: ignore


def one_position_for_all(self, frames: Sequence[Sequence[int]], rows: Sequence[int], total: int) -> VisibleKV:
    view = honest_route(self, frames, rows, total)
    view.__class__ = Deaf
    return view


honest_route = KVHistory.route


def test_the_row_check_sees_keys_at_the_positions_of_another_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(KVHistory, "route", one_position_for_all)
    with pytest.raises(AssertionError):
        check_rows_are_themselves(MIXED)


def test_the_row_check_sees_rows_put_back_in_another_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streaming, "in_row_order", lambda visits, parts: torch.cat(list(parts)))
    with pytest.raises(AssertionError):
        check_rows_are_themselves(MIXED)


def test_the_row_check_sees_the_text_of_other_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        streaming, "rows_of_text", lambda text, rows, batch: rows_of_text(text, [batch - 1 - r for r in rows], batch)
    )
    with pytest.raises(AssertionError):
        check_rows_are_themselves(MIXED)


@pytest.mark.parametrize(
    ("rows", "shared"), [((0, 1, 3, 4), True), ((0, 3), True), ((0, 1, 3), False), ((3, 4, 5), False), ((3, 0), False)]
)
def test_text_is_shared_per_prompt_where_the_rows_allow_it(rows: tuple[int, ...], shared: bool):
    text = micro_network().text_kv(noise(1, 2, 5, 16))
    chosen = rows_of_text(text, rows, 6)
    assert (chosen is text) == shared
    for (k, v), (k_own, v_own) in zip(text.layers, chosen.layers, strict=True):
        each = len(rows) // len(k_own)
        for part, own in ((k, k_own), (v, v_own)):
            assert torch.equal(own.repeat_interleave(each, 0), part[[row // 3 for row in rows]])


def positions_matter(visible: Visible, policy: HistoryPolicy) -> float:
    """How far the answer moves when a route's frames are stored at other places of the same content."""
    case = replace(MIXED, prompts=1, branches=2, visible=tuple(visible))
    with torch.no_grad():
        return gap(answer(case, policy), densely(case, policy))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_routed_frame_stands_at_its_id_or_at_its_slot(policy: HistoryPolicy):
    assert positions_matter([(0, 3), (1, 2)], policy) < ATOL[torch.float64]
    relative = isinstance(policy, SinkWindow) and policy.relative
    keys, queries = policy.positions((0, 3), 6, BLOCK)
    assert (keys, queries) == (((0, 1), (2, 3)) if relative else ((0, 3), (6, 7)))


def test_what_is_visible_must_be_said_of_every_clip():
    generator = micro_generator(SinkWindow(1, 5), BLOCK)
    stream, (_, x) = MIXED.stream(generator), MIXED.latents()
    with pytest.raises(ValueError, match="visible gives frames for 2 clips, the stream holds 6"):
        generator.predict(x, 0.5, stream, [(0,), (1,)])


def test_nothing_routed_is_the_canonical_call_bit_for_bit():
    generator = micro_generator(SinkWindow(1, 5), BLOCK)
    stream, (_, x) = MIXED.stream(generator), MIXED.latents()
    with torch.no_grad():
        plain = generator.predict(x, 0.5, stream)
        assert torch.equal(generator.predict(x, 0.5, stream, [None] * 6), plain)
        shown = stream.policy.visible(stream.next_frame, BLOCK)
        assert gap(generator.predict(x, 0.5, stream, [shown] * 6), plain) < ATOL[torch.float64]
        assert gap(generator.predict(x, 0.5, stream, [shown[:-1]] * 6), plain) > SEEN
