"""Rewards files of other sizes, ids, seeds, adapters and rows are taken as they come, without a config in them.

The files are written by an oracle that shares no code with the scorers: transformers' own modules put together by hand,
adapters beside the weights, patches cut one by one, each row alone.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLModel

from tests.golden.__main__ import main
from tests.golden.rewards import check_file, read_json

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


@dataclass(frozen=True)
class Case:
    """One model of a golden set. rows: (frame seed, T or 1, H, W, text seed, n)."""

    wide: int
    deep: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    depth: int
    embed: int
    eyes: int
    ratio: int
    ids: dict[str, int]
    rows: tuple[tuple[int, int, int, int, int, int], ...]
    rank: int = 0
    alpha: int = 0
    outputs: int = 1


SETS = {
    "other seeds, ids, factor and rank": {
        "videoalign": Case(
            64, 128, 2, 4, 2, 320, 2, 32, 2, 2,
            {"vision": 311, "start": 318, "end": 317, "VQ": 304, "MQ": 302, "TA": 316, "other": 300},
            ((123, 4, 56, 84, 70, 40), (51, 6, 84, 56, 71, 33)), 2, 8,
        ),
        "hpsv3": Case(
            64, 128, 2, 4, 2, 320, 2, 32, 2, 2,
            {"vision": 301, "start": 302, "end": 303, "reward": 319, "other": 300},
            ((201, 1, 56, 84, 40, 30), (17, 1, 84, 56, 41, 24)),
        ),
    },
    "other sizes, three rows, a head per token": {
        "videoalign": Case(
            96, 80, 1, 6, 3, 330, 1, 48, 4, 3,
            {"vision": 301, "start": 302, "end": 303, "VQ": 310, "MQ": 311, "TA": 312, "other": 300},
            ((5, 2, 28, 56, 20, 40), (6, 4, 56, 28, 21, 33), (7, 2, 84, 28, 22, 50)), 8, 8, 3,
        ),
        "hpsv3": Case(
            32, 48, 3, 2, 1, 315, 3, 16, 2, 2,
            {"vision": 300, "start": 302, "end": 303, "reward": 313, "other": 301},
            ((31, 1, 28, 28, 40, 30), (8, 1, 84, 28, 41, 24), (40, 1, 28, 56, 42, 25)),
        ),
    },
}  # fmt: skip


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The filling rule, as it is written down beside the packaged files."""
    z = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if "norm" in name or ".ln_q." in name:
        v = (1.0 if name.endswith("weight") else 0.0) + 0.05 * z
    elif len(shape) == 1:
        v = 0.05 * z
    else:
        v = (0.05 if "lora_" in name else 0.15) * z
    return torch.from_numpy(np.asarray(v)).float()


def build(case: Case, model: str) -> Qwen2VLModel:
    """transformers' modules, every parameter drawn by its name; adapters beside the weights, by hooks."""
    half = case.wide // case.heads // 2
    seen = "video" if model == "videoalign" else "image"
    ids = {
        f"{seen}_token_id": case.ids["vision"],
        f"{'image' if seen == 'video' else 'video'}_token_id": case.ids["other"],
    }
    text = {
        "hidden_size": case.wide, "intermediate_size": case.deep, "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads, "num_key_value_heads": case.groups, "vocab_size": case.vocabulary,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
        },
    }  # fmt: skip
    vision = {"depth": case.depth, "embed_dim": case.embed, "hidden_size": case.wide, "num_heads": case.eyes,
              "mlp_ratio": case.ratio, "in_channels": 3}  # fmt: skip
    network = Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision, **ids)).eval()
    network.set_attn_implementation("eager")
    for name, parameter in network.named_parameters():
        parameter.data = value(name, tuple(parameter.shape))
    if case.rank:
        for name, module in network.language_model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                stem = f"language_model.layers.{name}"
                down = value(f"{stem}.lora_A.weight", (case.rank, module.in_features))
                up = value(f"{stem}.lora_B.weight", (module.out_features, case.rank))
                module.register_forward_hook(
                    lambda _, inputs, out, down=down, up=up: out + case.alpha / case.rank * (inputs[0] @ down.T) @ up.T
                )
    return network


def drawn(row: tuple[int, int, int, int, int, int], model: str) -> np.ndarray:
    seed, count, height, width, *_ = row
    shape = (count, 3, height, width) if model == "videoalign" else (3, height, width)
    pixels = np.random.RandomState(seed).randint(0, 256, shape).astype(np.float32)
    return pixels if model == "videoalign" else np.stack([pixels, pixels])


def cut(frames: np.ndarray) -> Tensor:
    """Patches in their order, by loops."""
    shown = (torch.from_numpy(frames) / 255 - torch.tensor(MEAN).float().view(3, 1, 1)) / torch.tensor(
        STD
    ).float().view(3, 1, 1)
    t, h, w = len(frames) // 2, frames.shape[2] // 28, frames.shape[3] // 28
    out = []
    for time in range(t):
        for row in range(h):
            for column in range(w):
                for y in range(2):
                    for x in range(2):
                        top, left = 28 * row + 14 * y, 28 * column + 14 * x
                        patch = shown[2 * time : 2 * time + 2, :, top : top + 14, left : left + 14]
                        out.append(torch.stack([patch[:, channel] for channel in range(3)]).flatten())
    return torch.stack(out)


def tokens(case: Case, row: tuple[int, int, int, int, int, int], model: str, count: int) -> list[int]:
    *_, seed, n = row
    s, ids = np.random.RandomState(seed).randint(0, 290, n).tolist(), case.ids
    shown = [ids["start"], *[ids["vision"]] * count, ids["end"]]
    if model == "videoalign":
        return [*s[:5], *shown, *s[5:15], ids["VQ"], *s[15:22], ids["MQ"], *s[22:28], ids["TA"], *s[28:]]
    return [*s[:4], *shown, *s[4:20], ids["reward"], *s[20:]]


@torch.no_grad()
def judge(case: Case, model: str, network: Qwen2VLModel, row: tuple, wrong: bool) -> list[float]:
    """One row alone: embeddings put in place by hand, positions given."""
    frames = drawn(row, model)
    grid = [len(frames) // 2, frames.shape[2] // 14, frames.shape[3] // 14]
    features = network.visual(cut(frames), torch.tensor([grid])).pooler_output
    ids = torch.tensor(tokens(case, row, model, len(features)))
    embedded = network.language_model.embed_tokens(ids)
    embedded[ids == case.ids["vision"]] = features
    positions = torch.arange(len(ids)).expand(3, 1, -1)
    if wrong:
        kinds = (ids == case.ids["vision"]).int()[None] * (2 if model == "videoalign" else 1)
        size = {"video_grid_thw" if model == "videoalign" else "image_grid_thw": torch.tensor([grid])}
        positions = network.get_rope_index(
            input_ids=ids[None],
            mm_token_type_ids=kinds,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            **size,
        )[0]
    hidden = network.language_model(inputs_embeds=embedded[None], position_ids=positions).last_hidden_state[0]
    if model == "hpsv3":
        (h,) = hidden[ids == case.ids["reward"]]
        for i, shape in (("0", (1024, case.wide)), ("3", (16, 1024)), ("5", (2, 16))):
            h = value(f"rm_head.{i}.weight", shape) @ h + value(f"rm_head.{i}.bias", shape[:1])
            h = h if i == "5" else h.clamp(min=0)
        return h.tolist()
    head = value("rm_head.weight", (case.outputs, case.wide))
    found = [hidden[ids == case.ids[name]][0] @ head.T for name in ("VQ", "MQ", "TA")]
    return [float(scores[i if case.outputs == 3 else 0]) for i, scores in enumerate(found)]


def key_list(case: Case, model: str, network: Qwen2VLModel) -> dict[str, Any]:
    """The checkpoint's keys in the old layout with shapes and sums."""
    prefix = "base_model.model." if case.rank else ""
    sizes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    out: dict[str, Any] = {}

    def add(key: str, name: str, shape: tuple[int, ...]) -> None:
        out[prefix + key] = [list(shape), round(float(value(name, shape).double().sum()), 6)]

    for name, shape in sorted(sizes.items(), key=lambda item: not item[0].startswith("visual.")):
        old = name.replace("language_model.", "model.")
        stem, _, leaf = old.rpartition(".")
        adapted = bool(case.rank) and "_proj" in old
        add(f"{stem}.base_layer.{leaf}" if adapted else old, name, shape)
        if adapted and (leaf == "bias" or name.replace("weight", "bias") not in sizes):
            inner, (rows, columns) = name.rpartition(".")[0], sizes[name.rpartition(".")[0] + ".weight"]
            add(f"{stem}.lora_A.default.weight", f"{inner}.lora_A.weight", (case.rank, columns))
            add(f"{stem}.lora_B.default.weight", f"{inner}.lora_B.weight", (rows, case.rank))
    out[f"{prefix}lm_head.weight"] = [[case.vocabulary, case.wide], None]
    if model == "videoalign":
        add("rm_head.weight", "rm_head.weight", (case.outputs, case.wide))
    else:
        for i, shape in (("0", (1024, case.wide)), ("3", (16, 1024)), ("5", (2, 16))):
            add(f"rm_head.{i}.weight", f"rm_head.{i}.weight", shape)
            add(f"rm_head.{i}.bias", f"rm_head.{i}.bias", shape[:1])
    return out


def write(name: str, path: Path) -> Path:
    """The two files of a set."""
    scores: dict[str, Any] = {"transformers": "by hand"}
    extra: dict[str, Any] = {}
    for model, case in SETS[name].items():
        network = build(case, model)
        patches = [cut(drawn(row, model)) for row in case.rows]
        grids = [[(row[1] + 1) // 2, row[2] // 14, row[3] // 14] for row in case.rows]
        scores[model] = [judge(case, model, network, row, False) for row in case.rows]
        wrong = [judge(case, model, network, row, True) for row in case.rows]
        (scores if model == "videoalign" else extra)[f"{model}_if_mrope_WRONG"] = wrong
        scores[f"{model}_pixel_sum"] = sum(float(part.double().sum()) for part in patches)
        extra[model] = {
            "grid_thw": grids,
            "pixel_values_shape": [sum(map(len, patches)), 1176],
            "pixel_values_row0_first6": [round(x, 7) for x in patches[0][0, :6].tolist()],
            "input_ids": [
                tokens(case, row, model, t * h * w // 4) for row, (t, h, w) in zip(case.rows, grids, strict=True)
            ],
            "parameters": key_list(case, model, network),
        }
    (path / "rewards_golden.json").write_text(json.dumps(scores))
    (path / "rewards_golden_extra.json").write_text(json.dumps(extra))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_files_of_another_set_hold_without_a_config(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status = main([str(write(name, tmp_path))])
    out = capsys.readouterr().out
    assert status == 0 and "0 outside their tolerance, 0 files failed" in out, out


@pytest.mark.slow
def test_a_score_of_another_set_that_is_moved_misses(tmp_path: Path):
    """Trying what the file does not say finds nothing that gives other numbers."""
    file = write([*SETS][1], tmp_path) / "rewards_golden.json"
    document = read_json(file)
    moved = [[1e-3 + mu, s] for mu, s in document["hpsv3"]]
    document = {"hpsv3": moved, "hpsv3_pixel_sum": document["hpsv3_pixel_sum"]}
    file.write_text(json.dumps(document))
    assert {row.tensor for row in check_file(file) if not row.passed} == {"hpsv3"}
