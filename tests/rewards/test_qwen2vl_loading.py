"""A checkpoint is loaded whole or not at all: each key that is lost, renamed or reshaped is an error that names it."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rewards.qwen2vl import LinearHead, Qwen2VLReward, empty_backbone
from rewards.qwen2vl_loading import UnmergedLoRA, load_reward, match_keys, read_checkpoint
from rewards.qwen2vl_release import read_config, read_settings, setting
from tests.golden.tiny_qwen import MODELS, Setup, canonical
from tests.rewards.scorers import reward, setup
from tests.support import close
from tests.test_security import Burglar

GIVEN = {model: setup().checkpoint(model) for model in MODELS}
"""The released layouts, filled by name."""
LORA = {"videoalign": setup().lora, "hpsv3": None}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    """The parameters of both networks, by name."""
    return {model: {**reward(model).backbone.state_dict(), **reward(model).head.state_dict()} for model in MODELS}


def matched(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], lora: UnmergedLoRA | None) -> set[str]:
    """The keys that are used. Raises ValueError as `match_keys` does."""
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    found = match_keys(shapes, parameters, (320, 64), lora, "the file")
    return {key for source in found.values() for key in (source.weight, source.down, source.up) if key is not None}


def load(path: Path, model: str = "videoalign", dtype: torch.dtype = torch.float32, **changed) -> Qwen2VLReward:
    return replace(setup(), **changed).load(model, path, dtype, "sdpa")


def scores(scorer: Qwen2VLReward, model: str = "videoalign") -> Tensor:
    patches, grids = setup().patches(model)
    return scorer(setup().token_rows(model, grids), patches, grids)


def saved(tensors: Mapping[str, Tensor], folder: Path, name: str = "model.safetensors") -> Path:
    path = folder / name
    if name.endswith(".safetensors"):
        save_file(dict(tensors), path)
    else:
        torch.save(dict(tensors), path)
    return path


# Every key


@pytest.mark.parametrize("model", MODELS)
def test_every_key_of_the_released_layout_is_used_but_for_the_language_models_head(model: str, expected):
    used = matched(GIVEN[model], expected[model], LORA[model])
    assert GIVEN[model].keys() - used == {key for key in GIVEN[model] if key.endswith("lm_head.weight")}


@pytest.mark.parametrize("model", MODELS)
def test_each_key_that_is_removed_is_named(model: str, expected):
    for key in GIVEN[model]:
        others = {name: tensor for name, tensor in GIVEN[model].items() if name != key}
        with pytest.raises(ValueError, match=rf"missing.*'{re.escape(key)}'"):
            matched(others, expected[model], LORA[model])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "change", ["suffix", "prefix", "typo", "other adapter", "no base_layer", "present-day", "no PEFT"]
)
def test_each_key_that_is_renamed_is_named(model: str, change: str, expected):
    for key in GIVEN[model]:
        renamed = {
            "suffix": f"{key}_2",
            "prefix": f"module.{key}",
            "typo": key.replace("weight", "wieght").replace("bias", "bais"),
            "other adapter": key.replace(".default.", ".reward."),
            "no base_layer": key.replace(".base_layer.", "."),
            "present-day": key.replace("model.layers", "model.language_model.layers").replace(
                "visual.", "model.visual."
            ),
            "no PEFT": key.removeprefix("base_model.model."),
        }[change]
        if renamed == key:
            continue
        changed = {renamed if name == key else name: tensor for name, tensor in GIVEN[model].items()}
        with pytest.raises(ValueError) as refused:
            matched(changed, expected[model], LORA[model])
        assert f"'{key}'" in str(refused.value) and f"'{renamed}'" in str(refused.value)


@pytest.mark.parametrize("model", MODELS)
def test_each_key_of_another_shape_is_named(model: str, expected):
    for key, tensor in GIVEN[model].items():
        wrong = {"flat": tensor[None], "short": tensor[:-1] if len(tensor) > 1 else tensor[:, :-1]}
        if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]:
            wrong["turned"] = tensor.T
        for other in wrong.values():
            with pytest.raises(ValueError, match=re.escape(f"{key} is {tuple(other.shape)}, not")):
                matched({**GIVEN[model], key: other}, expected[model], LORA[model])


@pytest.mark.parametrize("model", MODELS)
def test_a_key_that_nobody_knows_is_named(model: str, expected):
    prefix = "base_model.model." if model == "videoalign" else ""
    for key in ("visual.extra.weight", "model.layers.2.mlp.up_proj.weight", "rm_head.7.bias", "step", "rm_head"):
        with pytest.raises(ValueError, match=rf"unknown \['{re.escape(prefix + key)}'"):
            matched({**GIVEN[model], prefix + key: torch.ones(1)}, expected[model], LORA[model])


def test_a_module_that_lacks_the_adapter_of_its_siblings_is_named(expected):
    """Neither a merged module among unmerged ones nor one that lost its adapter is a whole file."""
    stem = "base_model.model.model.layers.1.mlp.up_proj."
    mixed = {
        key.replace(".base_layer.", ".") if key.startswith(stem) else key: tensor
        for key, tensor in GIVEN["videoalign"].items()
        if not (key.startswith(stem) and ".lora_" in key)
    }
    with pytest.raises(ValueError, match=rf"3 keys missing.*{re.escape(stem)}base_layer"):
        matched(mixed, expected["videoalign"], LORA["videoalign"])


def test_adapters_need_their_rank_and_alpha_and_only_they_do(expected):
    with pytest.raises(ValueError, match="lora_A"):
        matched(GIVEN["videoalign"], expected["videoalign"], UnmergedLoRA(8, 16))
    with pytest.raises(ValueError, match=r"14 unmerged adapters, but lora=None|lora_A"):
        matched(GIVEN["videoalign"], expected["videoalign"], None)
    with pytest.raises(ValueError, match="no unmerged adapters"):
        matched(GIVEN["hpsv3"], expected["hpsv3"], UnmergedLoRA(4, 8))


def test_nothing_is_half_loaded(tmp_path: Path):
    head = LinearHead(64, 1, 3)
    before = head.rm_head.weight.clone()
    lost = {key: tensor for key, tensor in GIVEN["videoalign"].items() if "layers.1.mlp.up_proj.lora_B" not in key}
    tokens = setup().reward_tokens("videoalign")
    with pytest.raises(ValueError, match="lora_B"):
        load_reward(saved(lost, tmp_path), setup().config(), head, tokens, setup().lora, torch.float32)
    assert torch.equal(head.rm_head.weight, before)


# What is loaded


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_has_the_files_value(model: str, expected):
    by_name = {canonical(key): tensor for key, tensor in GIVEN[model].items()}
    torch.manual_seed(0)
    fresh = setup().head(model).state_dict()
    for name, tensor in expected[model].items():
        weight = by_name[name].double()
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in by_name:
            weight += 2 * by_name[f"{stem}.lora_B.weight"].double() @ by_name[f"{stem}.lora_A.weight"].double()
        close(tensor, weight, atol=1e-6)
        assert name not in fresh or not torch.equal(tensor, fresh[name])


def test_merged_and_unmerged_adapters_score_the_same_and_another_alpha_does_not(tmp_path: Path):
    head = {"rm_head.weight": GIVEN["videoalign"]["base_model.model.rm_head.weight"]}
    merged = {**reward("videoalign").backbone.state_dict(), **head}
    unmerged = scores(reward("videoalign"))
    tokens, config = setup().reward_tokens("videoalign"), setup().config()
    whole = load_reward(saved(merged, tmp_path), config, LinearHead(64, 1, 3), tokens, None, torch.float32)
    close(scores(whole), unmerged, atol=1e-5)
    other = load(saved(GIVEN["videoalign"], tmp_path, "model.pth"), lora=UnmergedLoRA(4, 4))
    with pytest.raises(AssertionError):
        close(scores(other), unmerged, atol=1e-2)


def present_day(model: str, body_alone: bool) -> dict[str, Tensor]:
    """The checkpoint with the keys that transformers 5 writes, merged or with PEFT's."""
    out = {}
    for key, tensor in GIVEN[model].items():
        peft = "base_model.model." if key.startswith("base_model.model.") else ""
        inner = key.removeprefix(peft)
        if inner.startswith("visual."):
            inner = inner if body_alone else f"model.{inner}"
        elif inner.startswith("model."):
            inner = inner.replace("model.", "language_model." if body_alone else "model.language_model.", 1)
        out[peft + inner] = tensor
    return out


@pytest.mark.parametrize("body_alone", [False, True], ids=["conditional generation", "body alone"])
@pytest.mark.parametrize("model", MODELS)
def test_the_layouts_of_transformers_5_are_read_too(model: str, body_alone: bool, tmp_path: Path):
    tensors = present_day(model, body_alone)
    assert tensors.keys() != GIVEN[model].keys()
    without_head = {key: tensor for key, tensor in tensors.items() if not key.endswith("lm_head.weight")}
    assert torch.equal(scores(load(saved(without_head, tmp_path), model), model), scores(reward(model), model))


@pytest.mark.parametrize("name", ["model.pth", "model.bin", "model.safetensors"])
def test_every_container_gives_the_same_scores(name: str, tmp_path: Path):
    path = saved(GIVEN["hpsv3"], tmp_path, name)
    from_file, from_folder = read_checkpoint(path), read_checkpoint(tmp_path)
    assert from_file.keys() == from_folder.keys() == GIVEN["hpsv3"].keys()
    assert all(torch.equal(tensor, GIVEN["hpsv3"][key]) for key, tensor in from_file.items())


def shards(folder: Path, suffix: str = "safetensors") -> Path:
    """The checkpoint in two files and an index."""
    keys = sorted(GIVEN["hpsv3"])
    places = {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-{i}.{suffix}"
        saved({key: GIVEN["hpsv3"][key] for key in part}, folder, name)
        places |= dict.fromkeys(part, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return index


def test_shards_are_read_through_their_index(tmp_path: Path):
    index = shards(tmp_path)
    for path in (index, tmp_path):
        assert torch.equal(scores(load(path, "hpsv3"), "hpsv3"), scores(reward("hpsv3"), "hpsv3"))


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path):
    index = shards(tmp_path)
    places = json.loads(index.read_text())["weight_map"]
    for wrong, message in (
        ({**places, "rm_head.5.bias": "model-9.safetensors"}, "model-9|disagree"),
        (
            {key: file for key, file in places.items() if key != "rm_head.5.bias"},
            r"disagree about \['rm_head.5.bias'\]",
        ),
        ({**places, "another": "model-0.safetensors"}, r"disagree about \['another'\]"),
        ({key: f"../{file}" for key, file in places.items()}, "not in its own folder"),
        ([], "not an index"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=message):
            read_checkpoint(index)


def test_a_head_of_three_outputs_is_loaded_and_a_wrong_one_refused(tmp_path: Path):
    three = replace(setup(), output_dim=3)
    path = saved(three.checkpoint("videoalign"), tmp_path)
    assert scores(three.load("videoalign", path)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"rm_head.weight is \(3, 64\), not \(1, 64\)"):
        load(path)


def test_another_size_loads_as_well(tmp_path: Path):
    other = Setup.of(
        {
            "config": {
                "text": {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1},
                "vision": {"depth": 1, "embed_dim": 24, "num_heads": 3},
                "lora": {"rank": 3, "alpha": 5},
            }
        }
    )
    patches, grids = other.patches("videoalign")
    assert bool(other.build("videoalign")(other.token_rows("videoalign", grids), patches, grids).isfinite().all())
    with pytest.raises(ValueError, match="does not fit"):
        load(saved(other.checkpoint("videoalign"), tmp_path))


REAL = {
    "videoalign": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
                   "vocab_size": 151660},
    "hpsv3": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
              "vocab_size": 151658},
}  # fmt: skip
"""The released text sizes, as the base models' configs and the token tables give them."""


@pytest.mark.slow
@pytest.mark.parametrize(("model", "keys", "gigabytes"), [("videoalign", 1123, 5.03), ("hpsv3", 736, 16.58)])
def test_the_released_sizes_have_the_files_number_of_keys_and_bytes(model: str, keys: int, gigabytes: float):
    """Without weights: the keys of the released layout at full size, matched with the network's parameters."""
    other = Setup.of(
        {
            "config": {
                "text": REAL[model] | {"num_hidden_layers": 28, "mrope_section": [16, 24, 24]},
                "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
                "lora": {"rank": 64, "alpha": 128},
            }
        }
    )
    shapes = {key: torch.Size(shape) for key, shape in other.layout(model).items()}
    assert len(shapes) == keys
    assert round(sum(2 * shape.numel() for shape in shapes.values()) / 1e9, 2) == gigabytes
    parameters = {**empty_backbone(other.config()).state_dict(), **other.head(model).state_dict()}
    rows = (REAL[model]["vocab_size"], REAL[model]["hidden_size"])
    assert (
        match_keys(shapes, parameters, rows, other.lora if model == "videoalign" else None, "").keys()
        == parameters.keys()
    )


def test_the_file_may_vanish_after_loading(tmp_path: Path):
    path = saved(GIVEN["videoalign"], tmp_path, "model.pth")
    scorer = load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(scores(scorer), scores(reward("videoalign")))


# What is no checkpoint


def test_a_file_that_would_run_code_is_not_read(tmp_path: Path):
    mark = tmp_path / "mark"
    torch.save({"x": Burglar(mark)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="plain tensors"):
        read_checkpoint(tmp_path / "model.pth")
    assert not mark.exists()


def test_other_things_are_refused_by_name(tmp_path: Path):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "broken.pth").write_bytes(b"no")
    (tmp_path / "notes.txt").write_text("no")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    torch.save({"x": 3}, tmp_path / "number.pth")
    torch.save({"x": torch.ones(1, dtype=torch.int64)}, tmp_path / "whole.pth")
    for name in ("broken.safetensors", "broken.pth", "notes.txt", "list.pth", "number.pth", "whole.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name) as refused:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="must hold one checkpoint"):
        read_checkpoint(tmp_path)


# Settings and the base model's config


def test_settings_are_found_at_any_depth_and_refused_where_they_differ(tmp_path: Path):
    (tmp_path / "model_config.json").write_text('{"a": {"VQ_mean": 1.5}, "b": [{"VQ_std": 2}, {"VQ_std": 3}]}')
    (tmp_path / "checkpoint-1").mkdir()
    settings = read_settings(tmp_path / "checkpoint-1" / "model.pth", "model_config.json")
    assert setting(settings, "VQ_mean") == 1.5
    with pytest.raises(ValueError, match="several values of 'VQ_std'"):
        setting(settings, "VQ_std")
    with pytest.raises(ValueError, match="no 'TA_mean'"):
        setting(settings, "TA_mean")
    with pytest.raises(ValueError, match=r"no other.json beside"):
        read_settings(tmp_path, "other.json")
    for text in ("{", "[]"):
        (tmp_path / "model_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"model_config\.json"):
            read_settings(tmp_path, "model_config.json")


def test_a_base_config_gets_the_scorers_table(tmp_path: Path):
    setup().config().save_pretrained(tmp_path)
    config = read_config(str(tmp_path), 77)
    assert config.text_config.vocab_size == 77 and config.text_config.hidden_size == 64
    with pytest.raises(ValueError, match="base="):
        read_config(str(tmp_path / "nowhere"), 77)
