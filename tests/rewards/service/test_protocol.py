"""What travels arrives as it was sent, bit for bit; anything else is refused before it is believed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from hypothesis import strategies as st

from framework.serving import protocol
from framework.serving.digest import model_digest
from framework.serving.protocol import (
    Answer,
    ProtocolError,
    Request,
    clip_names,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    pack,
    unpack,
)
from framework.types import Scores, VideoBatch, Window
from rewards.composite import CompositeReward
from rewards.shapes import ShapesReward
from tests.rewards.service.serving import Counted, clips, same
from tests.support import Brightness, holds, over, refuted

SEEDS, ORDERS = st.integers(0, 2**20), st.permutations(range(5))
PROMPTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def laid_out(videos: VideoBatch, order: list[int]) -> VideoBatch:
    """The same clips in another order in memory."""
    back = [order.index(i) for i in range(5)]
    return replace(videos, frames=videos.frames.permute(order).contiguous().permute(back))


def check_lossless(read: Callable[[bytes], Request], seed: int, order: list[int], prompt: str) -> None:
    sent = laid_out(clips(3, seed), order)
    sent = replace(sent, windows=tuple((Window(0, 2, prompt), Window(1, 3, f"{prompt} {i}")) for i in range(3)))
    request = Request.of(sent, "digest")
    got = read(encode_request(request))
    assert torch.equal(got.videos.frames, sent.frames) and got.videos.frames.stride() == sent.frames.stride()
    assert (got.videos.fps, got.videos.windows) == (sent.fps, sent.windows)
    assert (got.digest, got.clips, got.name) == (request.digest, request.clips, request.name)


def test_a_request_arrives_as_it_was_sent_order_in_memory_included() -> None:
    holds(partial(check_lossless, decode_request), SEEDS, ORDERS, PROMPTS)


def test_the_check_sees_frames_that_were_compressed_or_laid_out_anew() -> None:
    def lossy(data: bytes) -> Request:
        got = decode_request(data)
        return replace(got, videos=replace(got.videos, frames=got.videos.frames // 2 * 2))

    def contiguous(data: bytes) -> Request:
        got = decode_request(data)
        return replace(got, videos=replace(got.videos, frames=got.videos.frames.contiguous()))

    refuted(partial(check_lossless, lossy), SEEDS, ORDERS, PROMPTS)
    refuted(partial(check_lossless, contiguous), SEEDS, ORDERS, PROMPTS)


@over(st.lists(st.one_of(st.floats(width=32), st.just(float("nan"))), min_size=1, max_size=6))
def test_scores_arrive_as_they_are_and_what_is_not_finite_is_invalid(values: list[float]) -> None:
    scores = Scores.of({"a": torch.tensor(values), "b": torch.arange(float(len(values)))})
    scores = replace(scores, windows={"a": torch.rand(len(values), 2)})
    names = tuple(map(str, range(len(values))))
    got = decode_answer(encode_answer(Answer("id", "digest", names, scores)))
    finite = torch.isfinite(scores.values["a"])
    assert torch.equal(got.scores.valid["a"], finite) and torch.equal(got.scores.values["b"], scores.values["b"])
    assert torch.equal(got.scores.values["a"][finite], scores.values["a"][finite])
    assert bool(got.scores.values["a"][~finite].isnan().all())
    assert torch.equal(got.scores.windows["a"], scores.windows["a"])


@over(SEEDS, st.integers(0, 400), st.integers(1, 255))
def test_a_message_that_was_changed_or_cut_on_the_way_is_refused(seed: int, place: int, other: int) -> None:
    sent = encode_request(Request.of(clips(1, seed), "digest"))
    for data in (sent[: len(sent) - 1 - place % len(sent)], sent + b"x", b""):
        with pytest.raises(ProtocolError):
            decode_request(data)
    place %= len(sent)
    broken = sent[:place] + bytes([sent[place] ^ other]) + sent[place + 1 :]
    try:
        got = decode_request(broken)
    except ProtocolError:
        return
    # what still reads is what was meant: a digest may change, which the service then refuses
    assert same(Brightness().score(got.videos), Brightness().score(clips(1, seed))) or got.digest != "digest"


@pytest.mark.parametrize(
    "header",
    [
        {"arrays": [["frames", "float16", [1], [0]]]},
        {"arrays": [["frames", "uint8", [-1], [0]]]},
        {"arrays": [["frames", "uint8", [2**62, 2**62], [0, 1]]]},
        {"arrays": [["frames", "uint8", [1], [7]]]},
        {"arrays": 3},
        {},
    ],
)
def test_a_header_that_lies_is_refused(header: dict) -> None:
    packed = protocol.messages().packb(header)
    with pytest.raises(ProtocolError):
        unpack(protocol.FRAME.pack(protocol.MAGIC, protocol.SCHEMA, len(packed)) + packed + b"x")


def test_scores_of_another_number_than_the_clips_are_refused() -> None:
    scores = Scores.of({"a": torch.rand(2)})
    with pytest.raises(ProtocolError, match="3 clips with"):
        decode_answer(encode_answer(Answer("id", "digest", ("x", "y", "z"), scores)))
    with pytest.raises(ProtocolError, match="KeyError"):
        decode_answer(pack({"id": "i", "digest": "d", "clips": [], "signals": ["a"], "windows": []}, {}))


def test_everything_that_a_score_depends_on_is_in_the_name_of_a_clip() -> None:
    plain = clips(1)
    brighter = plain.frames.clone()
    brighter[0, 0, 0, 0, 0] ^= 1
    others = [
        replace(plain, frames=brighter),
        replace(plain, fps=9.0),
        replace(plain, windows=((Window(0, 3, "other"),),)),
        replace(plain, windows=((Window(0, 2, plain.prompts[0]),),)),
    ]
    names = {clip_names(videos, "digest") for videos in (plain, *others)} | {clip_names(plain, "other")}
    assert len(names) == 6
    assert clip_names(clips(3, 5), "d")[1:] == clip_names(
        replace(clips(3, 5), frames=clips(3, 5).frames[1:], windows=clips(3, 5).windows[1:]), "d"
    )


def test_the_digest_tells_models_settings_and_weights_apart_and_nothing_else() -> None:
    def layer(seed: int) -> CompositeReward:
        torch.manual_seed(seed)
        model = Counted()
        model.settings = torch.nn.Linear(2, 2)  # pyright: ignore
        return CompositeReward([model])

    with torch.random.fork_rng():
        digests = [model_digest(m) for m in (ShapesReward(), Brightness(), Counted(), Counted("b"), layer(0), layer(1))]
        assert len(set(digests)) == len(digests)
        assert model_digest(layer(0)) == model_digest(layer(0)) and model_digest(ShapesReward()) == digests[0]

    class Module(torch.nn.Module, Brightness):
        def __init__(self, scale: float, words: str) -> None:
            super().__init__()
            self.scale, self.words, self.norm = scale, words, torch.nn.LayerNorm(2, eps=scale)

    @dataclass(frozen=True)
    class Loaded(Brightness):
        folder: str = "weights"

        def __post_init__(self) -> None:
            object.__setattr__(self, "network", torch.nn.Linear(2, 2))

    @dataclass(frozen=True)
    class Held(Brightness):
        part: Any = None

    different = [
        Module(1.0, "a"), Module(2.0, "a"), Module(1.0, "b"), Loaded(), Loaded(),
        *(Held(part) for part in (numpy.zeros(2), numpy.ones(2), torch.nn.LayerNorm(2), torch.nn.LayerNorm(2, 1e-1))),
        *(Held(Counted(words).score) for words in "ab"),
    ]  # fmt: skip
    assert len({model_digest(model) for model in different}) == len(different)
    assert model_digest(Module(1.0, "a")) == model_digest(different[0])

    class Named(Brightness):
        def digest(self) -> str:
            return "version 3 of the weights"

    assert model_digest(Named()) == model_digest(Named()) != model_digest(Brightness())
