"""The composed network gives the originals' scores, in any batch, and refuses rows that it would misread."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards.qwen2vl import LinearHead, PreferenceHead, Qwen2VLReward, RewardTokens, empty_backbone, tensors_digest
from tests.golden.__main__ import FOLDER
from tests.golden.rewards import read_json
from tests.golden.tiny_qwen import MODELS, Setup, multimodal_positions
from tests.rewards.scorers import reward, setup
from tests.support import close

SCORES = read_json(FOLDER / "rewards" / "rewards_golden.json")
Grid = tuple[int, int, int]


def batch(
    model: str, chosen: Sequence[int] = (0, 1), golden: bool = True
) -> tuple[list[list[int]], Tensor, list[Grid]]:
    """Rows of the golden batch with their patches and grids."""
    given = Setup.of({}) if golden else setup()
    chosen_rows = [given.rows[model][i] for i in chosen]
    given = replace(given, rows={**given.rows, model: chosen_rows})
    patches, grids = given.patches(model)
    return given.token_rows(model, grids), patches, grids


def golden(model: str) -> Qwen2VLReward:
    return reward(model, golden=True)


@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_the_original_classes(model: str):
    rows, patches, grids = batch(model)
    expected = torch.tensor(SCORES[model])
    close(golden(model)(rows, patches, grids), expected, atol=1e-5)
    with pytest.raises(AssertionError):  # what a present-day call would give
        wrong = multimodal_positions(golden(model), rows, grids)
        close(golden(model)(rows, patches, grids, wrong), expected, atol=0.1)


@pytest.mark.parametrize("model", MODELS)
def test_a_row_alone_scores_as_in_any_batch(model: str):
    together = golden(model)(*batch(model))
    for i in (0, 1):
        close(golden(model)(*batch(model, [i])), together[[i]], atol=2e-6)
    close(golden(model)(*batch(model, [1, 0, 1])), together[[1, 0, 1]], atol=2e-6)


def test_patches_of_a_sibling_would_be_noticed():
    rows, patches, grids = batch("hpsv3", [0])
    with pytest.raises(AssertionError):
        close(golden("hpsv3")(rows, patches.flip(0), grids), golden("hpsv3")(rows, patches, grids), atol=1e-3)


def edited(row: list[int], before: int, step: int) -> list[int]:
    """The row with the token that stands ``step`` places after ``before`` replaced."""
    at = row.index(before) + step
    return [*row[:at], (row[at] + 1) % 250, *row[at + 1 :]]


def test_quality_and_motion_cannot_depend_on_what_follows_them_and_alignment_does():
    model, (rows, patches, grids) = golden("videoalign"), batch("videoalign")
    mq = model.tokens.rewards[1]
    plain, other = model(rows, patches, grids), model([edited(rows[0], mq, 2), rows[1]], patches, grids)
    assert torch.equal(plain[:, :2], other[:, :2])
    assert float((plain[0, 2] - other[0, 2]).abs()) > 1e-3
    earlier = model([edited(rows[0], mq, -2), rows[1]], patches, grids)
    assert float((plain[0, 1] - earlier[0, 1]).abs()) > 1e-3  # it can change at all


@pytest.mark.parametrize("model", MODELS)
def test_a_body_in_bf16_scores_nearly_the_same_and_its_head_stays_in_fp32(model: str):
    rows, patches, grids = batch(model, golden=False)
    half, full = reward(model, torch.bfloat16), reward(model)
    scores = half(rows, patches, grids)
    assert half.dtype == torch.bfloat16 and {p.dtype for p in half.head.parameters()} == {torch.float32}
    assert {b.dtype for b in half.backbone.buffers()} == {torch.float32}  # position tables lose their use in bf16
    assert scores.dtype == torch.float32
    close(scores, full(rows, patches, grids), atol=0.15)
    assert not torch.equal(scores, full(rows, patches, grids))


def test_the_head_computes_in_fp32_inside_autocast():
    rows, patches, grids = batch("hpsv3", golden=False)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reward("hpsv3")(rows, patches, grids)
    assert inside.dtype == torch.float32
    assert not torch.equal(inside, inside.bfloat16().float())


def test_nothing_of_a_scorer_trains():
    model = reward("videoalign")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


# Refusals


def test_a_row_without_each_reward_token_once_is_refused():
    model, (rows, patches, grids) = golden("videoalign"), batch("videoalign", [0])
    vq, mq, ta = model.tokens.rewards
    row = rows[0]
    lacking = [token for token in row if token != mq]
    twice = [*row, vq]
    swapped = [{vq: ta, ta: vq}.get(token, token) for token in row]
    for wrong in (lacking, twice, swapped):
        with pytest.raises(ValueError, match="row 0 must have the reward tokens"):
            model([wrong], patches, grids)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_row_with_another_number_of_vision_tokens_is_refused(change: int):
    model, (rows, patches, grids) = golden("videoalign"), batch("videoalign")
    at = rows[1].index(model.tokens.vision)
    wrong = [*rows[1][:at], *[model.tokens.vision] * max(change, 0), *rows[1][at + (change < 0) :]]
    with pytest.raises(ValueError, match=r"row 1 has \d+ vision tokens"):
        model([rows[0], wrong], patches, grids)


def test_tokens_that_are_moved_from_one_row_to_another_are_refused():
    """The sum is right, so transformers itself would not notice."""
    model, (rows, patches, grids) = golden("videoalign"), batch("videoalign")
    vision = model.tokens.vision
    first, second = list(rows[0]), list(rows[1])
    second.insert(second.index(vision), first.pop(first.index(vision)))
    with pytest.raises(ValueError, match="row 0 has"):
        model([first, second], patches, grids)


def test_patches_that_do_not_fit_their_grids_are_refused():
    rows, patches, grids = batch("videoalign")
    with pytest.raises(ValueError, match="119 patches"):
        golden("videoalign")(rows, patches[1:], grids)
    with pytest.raises(ValueError, match="as many rows"):
        golden("videoalign")(rows, patches, grids[:1])


def test_tokens_that_coincide_or_are_unknown_are_refused():
    for wrong in ((301, (310, 310), 304), (301, (310,), 310), (301, (), 304)):
        with pytest.raises(ValueError, match="must differ"):
            RewardTokens(*wrong)
    model = golden("hpsv3")
    with pytest.raises(ValueError, match="neither of the config's"):
        Qwen2VLReward(model.backbone, model.head, RewardTokens(299, (313,), 304))


def test_a_head_of_another_size_is_refused():
    with pytest.raises(ValueError, match="output_dim"):
        LinearHead(8, 4, 3)


def test_a_head_of_one_output_per_token_gives_each_its_own():
    head = LinearHead(8, 3, 3)
    hidden = torch.randn(5, 3, 8)
    expected = torch.stack([hidden[:, i] @ head.rm_head.weight[i] for i in range(3)], 1)
    close(head(hidden), expected, atol=1e-6)


def test_the_preference_head_has_the_released_names():
    assert list(PreferenceHead(8).state_dict()) == [
        f"rm_head.{i}.{leaf}" for i in (0, 3, 5) for leaf in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("attention", "message"), [("flash", "must be one of"), ("flash_attention_2", "cannot be used")]
)
def test_an_attention_that_is_not_there_is_refused(attention: str, message: str):
    if attention == "flash_attention_2" and torch.cuda.is_available():
        pytest.skip("it may be installed here")
    with pytest.raises(ValueError, match=message):
        empty_backbone(setup().config(), attention)


def test_a_broken_torchvision_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(ValueError, match=r"torchvision.*nms does not exist.*install the build") as refused:
        empty_backbone(setup().config())
    assert "\n" not in str(refused.value)


# What is recorded


def test_a_scorer_says_what_its_scores_depend_on():
    said = reward("videoalign").details()
    assert said["attention"] == "sdpa" and said["body_dtype"] == "float32" and len(said["weights_sha256"]) == 64
    assert reward("videoalign", torch.bfloat16).details()["body_dtype"] == "bfloat16"
    assert reward("videoalign", torch.bfloat16).digest() == said["weights_sha256"]  # of the same checkpoint
    assert reward("hpsv3").digest() != said["weights_sha256"]


def test_a_digest_sees_every_byte_every_name_and_every_shape():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    known = tensors_digest(tensors)
    assert known == tensors_digest(dict(reversed(tensors.items())))
    moved = tensors["a"].clone()
    moved[3] += 1e-6
    changes = [{"a": moved}, {"a": tensors["a"].view(2, 3)}, {"b": tensors["b"].float()}, {"c": tensors["b"]}]
    assert known not in {tensors_digest(tensors | change) for change in changes}
