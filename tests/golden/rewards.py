"""The rewards folder: JSON files with scores, key lists and preprocessing tables of the two Qwen2-VL scorers.

A file's kind is told by its keys, not by its name. Every entry is compared or declared; an unknown one is an error.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.frame_sampling import CountedFrames, FrameSampling, MultiPointFrames, UniformFrames
from rewards.preprocess import (
    HPSV3_PIXELS,
    VIDEOALIGN_PIXELS,
    PixelBudget,
    gray_truncated,
    resize_pillow,
    resize_rounded,
)
from rewards.qwen2vl import Qwen2VLReward
from rewards.qwen2vl_loading import UnmergedLoRA
from tests.golden.case import Row
from tests.golden.tiny_qwen import MODELS, Setup, canonical, fill, multimodal_positions, sections

TOLERANCE = 1e-5
FAR = 1e-2
"""By how much scores with right and with wrong positions must differ: a thousand times the tolerance."""
DECLARED = ("transformers", "config", "hparams")
PREPROCESSING = re.compile(
    r"uniform_(?P<fps>[\d.]+)fps|explicit_nframes|multi_pts|smart_resize_(?:videoalign|hpsv3)|resize_and_gray"
)
LIKE_OURS = ("uniform", "explicit", "multi_pts", "smart_resize", "resize", *MODELS)
"""How entries of the rewards folder start: a file with one of them is taken up, and then every entry of it."""
FACTORS = (2, 1, 4, 0.5, 3, 8, 1.5, 0.25)
"""alpha/rank that are tried where a file does not say it and the packaged one does not give the scores."""


def read_json(path: Path) -> dict[str, Any]:
    """A golden document. Raises ValueError that names the file where it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a golden file: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} cannot be read as a golden file: it holds no table")
    return document


def is_golden(path: Path) -> bool:
    """Whether a JSON file is of the rewards folder's kinds."""
    return any(name.startswith(LIKE_OURS) for name in read_json(path))


def check_file(path: Path) -> list[Row]:
    """Compare one file with what this project computes. Raises ValueError for an entry that nobody accounts for."""
    document = read_json(path)
    unknown = [name for name, expected in document.items() if name not in DECLARED and not find_check(name, expected)]
    if unknown:
        raise ValueError(f"{path.name}: neither compared nor declared as an input: {', '.join(unknown)}")
    companion = _companion(path)
    built: dict[str, Scorer] = {}
    there = [model for model in MODELS if any(name.startswith(model) for name in document)]
    setups = {model: find_setup(model, document, companion, built) for model in there}
    rows: list[Row] = []
    for name, expected in document.items():
        compare = None if name in DECLARED else find_check(name, expected)
        if compare is None:
            continue
        if isinstance(expected, list | dict) and not expected:
            raise ValueError(f"{path.name}: {name} is empty, so nothing would be compared")
        setup = next((setups[model] for model in setups if name.startswith(model)), Setup.of({}))
        rows += compare(name, expected, setup, built)
    return rows


def find_setup(
    model: str, document: Mapping[str, Any], companion: Mapping[str, Any], built: dict[str, "Scorer"]
) -> Setup:
    """What one model of a pair of files was made with; the two may have other sizes and ids.

    What no config and no shape says, alpha and numbers of heads, is tried where the packaged values do not give the
    scores; the comparison says what it is.
    """
    tables = {name: value for name, value in companion.items() if isinstance(value, dict)}
    merged = {**companion, **document, **tables}
    others = tuple(other for other in MODELS if other != model)
    setup = Setup.of({name: value for name, value in merged.items() if not name.startswith(others)})
    scores = next((there for file in (document, companion) if isinstance(there := file.get(model), list)), None)
    if scores is None:
        return setup
    for tried in [setup, *other_setups(setup, merged.get("config", merged.get("hparams", {})), model)]:
        found = Scorer(tried, model)
        if difference(found.scores(), scores) <= TOLERANCE:
            built[model] = found
            return tried
    return setup


def other_setups(setup: Setup, said: Mapping[str, Any], model: str) -> Iterator[Setup]:
    """Setups with another alpha and other numbers of heads that go with the shapes, where ``said`` leaves them open."""
    text, vision, rank = setup.text, setup.vision, setup.lora.rank
    wide, embed, narrow = text["hidden_size"], vision["embed_dim"], text["hidden_size"] // text["num_attention_heads"]
    narrow *= text["num_key_value_heads"]
    alphas = [setup.lora.alpha]
    if model == "videoalign" and "alpha" not in said.get("lora", {}):
        alphas = list(dict.fromkeys((*alphas, *(factor * rank for factor in FACTORS))))
    heads, seeing = [text["num_attention_heads"]], [vision["num_heads"]]
    if "num_attention_heads" not in said.get("text", {}):
        fitting = [n for n in range(1, 9) if wide % (2 * n) == 0 and narrow % (wide // n) == 0]
        heads += [n for n in fitting if n not in heads and n % (narrow * n // wide) == 0]
    if "num_heads" not in said.get("vision", {}):
        seeing += [n for n in range(1, 9) if n not in seeing and embed % (4 * n) == 0]
    for count, eyes, alpha in product(heads, seeing, alphas):
        sizes = {**text, "num_attention_heads": count, "num_key_value_heads": narrow * count // wide}
        if "mrope_section" not in said.get("text", {}):
            sizes["mrope_section"] = sections(sizes)
        yield replace(setup, text=sizes, vision={**vision, "num_heads": eyes}, lora=UnmergedLoRA(rank, alpha))


def _companion(path: Path) -> dict[str, Any]:
    """The scores' key lists, X_extra.json beside X.json, and the other way round."""
    stem = path.stem
    other = path.with_name(f"{stem.removesuffix('_extra') if stem.endswith('_extra') else stem + '_extra'}.json")
    return read_json(other) if other.is_file() else {}


class Scorer:
    """A rebuilt tiny scorer with its batch."""

    def __init__(self, setup: Setup, model: str) -> None:
        self.reward: Qwen2VLReward = setup.build(model)
        self.patches, self.grids = setup.patches(model)
        self.rows = setup.token_rows(model, self.grids)

    @torch.no_grad()
    def scores(self, wrong: bool = False, attention: str = "eager") -> Tensor:
        """wrong: with the 3-D positions that a present-day call computes."""
        self.reward.backbone.set_attn_implementation(attention)
        positions = multimodal_positions(self.reward, self.rows, self.grids) if wrong else None
        return self.reward(self.rows, self.patches, self.grids, positions)


Check = Callable[[str, Any, Setup, dict[str, Scorer]], Iterator[Row]]


def find_check(name: str, expected: Any) -> Check | None:
    """What compares an entry of a document."""
    if PREPROCESSING.fullmatch(name):
        return check_preprocessing
    if name in MODELS:
        return check_layout if isinstance(expected, dict) else check_scores
    for ending, check in (("_if_mrope_WRONG", check_wrong), ("_pixel_sum", check_pixels), ("_keys", check_keys)):
        if name.removesuffix(ending) in MODELS:
            return check
    return None


def scorer(model: str, setup: Setup, built: dict[str, Scorer]) -> Scorer:
    """The model of a file, built once."""
    if model not in built:
        built[model] = Scorer(setup, model)
    return built[model]


def difference(actual: Any, expected: Any) -> float:
    """max |actual − expected|, infinite for another shape."""
    actual, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (actual, expected))
    return float((actual - expected).abs().max()) if actual.shape == expected.shape else float("inf")


def exact(name: str, actual: Any, expected: Any, how: str = "exact") -> Row:
    """A row for values that must be equal."""
    return Row(name, 0.0 if actual == expected else float("inf"), 0.0, how)


def check_scores(name: str, expected: Any, setup: Setup, built: dict[str, Scorer]) -> Iterator[Row]:
    """Raw scores, in both implementations of attention."""
    for attention in ("eager", "sdpa"):
        actual = scorer(name, setup, built).scores(attention=attention)
        heads = f"{setup.text['num_attention_heads']} and {setup.vision['num_heads']} heads"
        adapted = f", alpha/rank {setup.lora.scale:g}" if name == "videoalign" else ""
        yield Row(name, difference(actual, expected), TOLERANCE, f"float32, {attention}, {heads}{adapted}")


def check_wrong(name: str, expected: Any, setup: Setup, built: dict[str, Scorer]) -> Iterator[Row]:
    """With 3-D positions the same weights give the wrong scores, and ours are far from them."""
    used = scorer(name.removesuffix("_if_mrope_WRONG"), setup, built)
    yield Row(name, difference(used.scores(wrong=True), expected), TOLERANCE, "float32, with the 3-D positions")
    away = difference(used.scores(), expected)
    yield Row(name, 0.0 if FAR < away < float("inf") else float("inf"), 0.0, f"our scores are {away:.2g} away")


def check_pixels(name: str, expected: Any, setup: Setup, built: dict[str, Scorer]) -> Iterator[Row]:
    """The sum of the patches."""
    patches, _ = setup.patches(name.removesuffix("_pixel_sum"))
    yield Row(name, abs(float(patches.double().sum()) - expected) / max(1, abs(expected)), 1e-6, "relative")


def check_keys(name: str, expected: Any, setup: Setup, built: dict[str, Scorer]) -> Iterator[Row]:
    """Some keys of the checkpoint that was read."""
    keys = setup.checkpoint(name.removesuffix("_keys")).keys()
    yield exact(name, sorted(set(expected) - keys), [], "keys that the checkpoint has")


def check_layout(name: str, expected: Any, setup: Setup, built: dict[str, Scorer]) -> Iterator[Row]:
    """Grids, first patches, token rows, and every tensor of the checkpoint by its shape and sum."""
    patches, grids = setup.patches(name)
    actual = {
        "grid_thw": [list(grid) for grid in grids],
        "pixel_values_shape": list(patches.shape),
        "input_ids": setup.token_rows(name, grids),
    }
    for part, value in expected.items():
        full = f"{name}.{part}"
        if part in actual:
            yield exact(full, actual[part], value)
        elif part == "pixel_values_row0_first6":
            yield Row(full, difference(patches[0, : len(value)], value), 1e-6, "float32")
        elif part == "parameters":
            checkpoint = setup.checkpoint(name)
            yield exact(full, list(checkpoint), list(value), "keys and their order")
            there = {key: entry for key, entry in value.items() if key in checkpoint}
            shapes = [key for key, (shape, _) in there.items() if list(checkpoint[key].shape) != list(shape)]
            yield exact(full, shapes, [], "shapes")
            sums = [
                abs(float(fill(canonical(key), shape).double().sum()) - total)
                for key, (shape, total) in there.items()
                if total is not None
            ]
            yield Row(full, max(sums, default=0.0), 1e-5, f"sums of {len(sums)} tensors")
        else:
            raise ValueError(f"neither compared nor declared as an input: {full}")


def check_preprocessing(name: str, expected: Any, setup: Setup, built: dict[str, Scorer]) -> Iterator[Row]:
    """Frame indices, sizes and pixels."""
    if name == "resize_and_gray":
        for i, entry in enumerate(expected):
            yield from check_resize(f"{name}.{i}", entry)
    elif name.startswith("smart_resize"):
        budget = HPSV3_PIXELS if name.endswith("hpsv3") else VIDEOALIGN_PIXELS
        yield exact(name, [[h, w, *sized(budget, h, w)] for h, w, *_ in expected], expected, f"{len(expected)} sizes")
    else:
        match = PREPROCESSING.fullmatch(name)
        assert match is not None
        rules: dict[str, Callable[[Any], FrameSampling]] = {
            "explicit_nframes": lambda entry: CountedFrames(entry["nframes"]),
            "multi_pts": lambda entry: MultiPointFrames(),
        }
        rule = rules.get(name, lambda entry: UniformFrames(float(match["fps"])))
        unread = sorted({part for entry in expected for part in entry} - {"T", "fps", "indices", "nframes"})
        if unread:
            raise ValueError(f"neither compared nor declared as an input: {name}: {unread}")
        actual = [chosen(rule, entry) for entry in expected]
        yield exact(name, actual, [entry["indices"] for entry in expected], f"{len(expected)} clips")


def sized(budget: PixelBudget, height: int, width: int) -> Any:
    """The size of a table's entry, or that there is none."""
    try:
        return budget.size(height, width)
    except ValueError:
        return ["ValueError"]


def chosen(rule: Callable[[Any], FrameSampling], entry: Mapping[str, Any]) -> Any:
    """The indices of a table's entry, or that there are none."""
    try:
        return list(rule(entry).indices(entry["T"], entry.get("fps", 16), ""))
    except ValueError:
        return "ValueError"


def drawn_frames(entry: Mapping[str, Any]) -> Tensor:
    """uint8 frames [T, 3, H, W] of an entry."""
    shape, seed = tuple(entry["shape"]), entry["seed"]
    if entry["input"] == "random":
        return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8))
    if entry["input"] != "pattern":
        raise ValueError(f"resize_and_gray has frames of an unknown kind {entry['input']!r}")
    t, c, y, x = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return torch.from_numpy(((7 * seed + 3 * x * (c + 1) + 5 * y + 11 * t + x * y // 9) % 256).astype(np.uint8))


def check_resize(name: str, entry: Mapping[str, Any]) -> Iterator[Row]:
    """Hashes of resized and gray frames; where torch rounds a few values otherwise, their sum and a row within 1."""
    frames, size = drawn_frames(entry), tuple(entry["to"])
    yield exact(f"{name}.input_sha256", sha256(frames), entry["input_sha256"])
    computed = {
        "tensor_resize": resize_rounded(frames, size),
        "pil_resize": resize_pillow(frames, size),
        "gray": gray_truncated(frames),
    }
    extra = entry.keys() - computed.keys() - {"input", "seed", "shape", "to", "input_sha256"}
    if extra or not entry.keys() & computed.keys():
        raise ValueError(f"neither compared nor declared as an input: {name}: {sorted(extra)}, or nothing to compare")
    for part in entry.keys() & computed.keys():
        result, expected = computed[part], entry[part]
        ordered = result.permute(0, 2, 3, 1) if expected["layout"].startswith("THWC") else result
        if sha256(ordered) == expected["sha256"]:
            yield exact(f"{name}.{part}", True, True, "bit for bit")
            continue
        total = abs(int(ordered.long().sum()) - expected["sum"]) / expected["sum"]
        yield Row(f"{name}.{part}", total, 5e-4, "relative sum: another build of torch rounds some values otherwise")
        if "row_f0_c0_mid" in expected:
            row = result[0, 0, result.shape[2] // 2]
            yield Row(f"{name}.{part}", difference(row, expected["row_f0_c0_mid"]), 1.0, "the middle row")


def sha256(values: Tensor) -> str:
    """Over the bytes in the given layout."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
