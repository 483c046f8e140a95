"""Checkpoint files: what wraps the tensors comes off, what does not fit is named, and nothing is run or loaded half."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.wan import checkpoints
from backbones.wan.checkpoints import diffusers_name, original_name, plain_name, read_names, read_weights
from backbones.wan.containers import read_state
from backbones.wan.recipes import WAN_1_3B, WAN_14B, empty_network
from tests.backbones.wan_files import originals, ours, save_safetensors, save_torch, wrappings
from tests.support import close, holds, refuted
from tests.test_security import Burglar

STATE = ours()
ORIGINAL = originals(STATE)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        close(left[name], tensor, 0)


# Names


@pytest.mark.parametrize(("sizes", "count", "layers"), [(WAN_1_3B, 825, 30), (WAN_14B, 1095, 40)])
def test_every_tensor_of_the_real_networks_has_one_original_name(sizes: dict, count: int, layers: int) -> None:
    names = list(empty_network(sizes).state_dict())
    there = [original_name(name) for name in names]
    assert len(names) == len(set(there)) == count == 15 + 27 * layers
    assert [diffusers_name(str(name)) for name in there] == names


def check_round_trip(name: str, back: Callable[[str], str | None]) -> None:
    """A name survives the way to the other naming and back, and unknown ones have no other."""
    other = diffusers_name(name)
    assert other is None or back(other) == name


NAMES = st.one_of(
    st.sampled_from([*ORIGINAL, "blocks.0.norm2.weight", "blocks.0.norm2.bias", "modulation", "freqs", ""]),
    st.lists(st.sampled_from(["blocks", "0", "17", "self_attn", "q", "norm_k", "weight", "bias", "ffn", "head"]),
             max_size=5).map(".".join),
)  # fmt: skip


def test_names_round_trip() -> None:
    holds(lambda name: check_round_trip(name, original_name), NAMES, examples=200)

    def swapped(name: str) -> str | None:
        """The classic error: norm3 left as it is."""
        return None if ".norm2." in name else original_name(name)

    refuted(lambda name: check_round_trip(name, swapped), NAMES)


def check_unwrapped(keys: dict[str, str], plain: Callable[[str], str]) -> None:
    """Every tensor is found again, whatever was put around its name."""
    state = {**ORIGINAL, **STATE}
    naming = read_names({wrapped: plain(wrapped) for wrapped in keys.values()}, "file")
    for bare, wrapped in keys.items():
        close(STATE[naming.names[wrapped]], state[bare], 0)


def test_random_wrappers_and_prefixes_come_off() -> None:
    holds(lambda keys: check_unwrapped(keys, plain_name), wrappings(), examples=40)

    def once(key: str) -> str:
        for prefix in (*checkpoints.WRAPPERS, *checkpoints.PREFIXES):
            key = key.removeprefix(prefix)
        return key

    def check(keys: dict[str, str]) -> None:
        try:
            check_unwrapped(keys, once)
        except ValueError as error:
            raise AssertionError from error

    refuted(check, wrappings())


def test_a_name_that_only_looks_like_a_wrapper_stays() -> None:
    assert plain_name("blocks.0.my_base_layer.weight") == "blocks.0.my_base_layer.weight"
    assert plain_name("blocks.0.model.weight") == "blocks.0.model.weight"


# What does not fit is named


DAMAGES = st.tuples(
    st.sampled_from(("removed", "renamed", "reshaped", "duplicated", "integer")),
    st.sampled_from([*ORIGINAL, *(name for name in STATE if name not in ORIGINAL)]),
)


def damaged_state(kind: str, key: str) -> tuple[dict[str, Tensor], str]:
    """A whole micro checkpoint with one thing wrong, and what the message has to name."""
    state = dict(ORIGINAL if key in ORIGINAL else STATE)
    match kind:
        case "removed":
            del state[key]
        case "renamed":
            state[f"{key}x"] = state.pop(key)
            key = f"{key}x"
        case "reshaped":
            state[key] = torch.cat([state[key], state[key]])
        case "duplicated":
            state[f"model.{key}"] = state[key]
        case "integer":
            state[key] = state[key].to(torch.int32)
    return state, key


def check_refused(damage: tuple[str, str], read: Callable) -> None:
    """One line that names the key."""
    state, key = damaged_state(*damage)
    try:
        read(state, STATE, "weights.pt")
    except ValueError as error:
        assert key in str(error) and "weights.pt" in str(error) and "\n" not in str(error)
    else:
        raise AssertionError("nothing was said")


def test_every_key_that_is_missing_or_renamed_or_reshaped_or_there_twice_is_named() -> None:
    holds(lambda damage: check_refused(damage, read_weights), DAMAGES, examples=150)

    def careless(state: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
        """Takes what it knows and passes over the rest, as ``strict=False`` does."""
        known = {k: v for k, v in state.items() if (diffusers_name(k) or k) in expected}
        if len(known) < len(expected) // 2:
            raise ValueError(source)

    refuted(lambda damage: check_refused(damage, careless), DAMAGES)


def test_a_file_of_another_model_is_counted_and_shown_in_part() -> None:
    foreign = {f"encoder.layer.{n}.weight": torch.zeros(1) for n in range(50)}
    with pytest.raises(ValueError, match=r"50 of 50 keys are no .* names: .* and 46 more"):
        read_weights(foreign, STATE, "t5.pt")
    with pytest.raises(ValueError, match=r"is no text-to-video Wan checkpoint: 1 of .*img_emb.proj.0.weight"):
        read_weights({**ORIGINAL, "img_emb.proj.0.weight": torch.zeros(1)}, STATE, "i2v.pt")


def test_original_and_diffusers_names_in_one_file_are_refused() -> None:
    mixed = {**ORIGINAL, "proj_out.weight": STATE["proj_out.weight"]}
    with pytest.raises(ValueError, match=r"1 of .* keys are no original Wan names: proj_out.weight"):
        read_weights(mixed, STATE, "mixed.pt")


def test_another_size_is_refused_with_its_shapes() -> None:
    with pytest.raises(ValueError, match=r"tensors are missing: blocks.2"):
        expected = {**STATE, "blocks.2.norm2.bias": torch.zeros(24)}
        read_weights(ORIGINAL, expected, "small.pt")
    with pytest.raises(ValueError, match=r"shapes differ: .* is \[24\], needed \[48\]"):
        read_weights(ORIGINAL, {**STATE, "blocks.1.norm2.bias": torch.zeros(48)}, "narrow.pt")


# What belongs to a file and not to the network


def test_critics_and_tables_that_the_network_computes_are_left_out_and_said() -> None:
    more = {"freqs": torch.zeros(3, dtype=torch.complex64), "critic.blocks.0.modulation": torch.zeros(1),
            "model.freqs": torch.zeros(1)}  # fmt: skip
    weights = read_weights({**ORIGINAL, **more}, STATE, "file")
    same(dict(weights.tensors), STATE)
    assert weights.left_out == tuple(sorted(more))


def test_a_flattened_patch_embedding_gets_its_shape_back() -> None:
    flat = {**ORIGINAL, "patch_embedding.weight": ORIGINAL["patch_embedding.weight"].flatten(1)}
    same(dict(read_weights(flat, STATE, "file").tensors), STATE)
    turned = {**ORIGINAL, "patch_embedding.weight": flat["patch_embedding.weight"].T}
    with pytest.raises(ValueError, match=r"patch_embedding.weight is \[64, 24\], needed \[24, 16, 1, 2, 2\]"):
        read_weights(turned, STATE, "file")


# Containers


def shards(folder: Path, state: dict[str, Tensor]) -> Path:
    """Three shards and their index."""
    parts = {f"model-0000{i + 1}-of-00003.safetensors": sorted(state)[i::3] for i in range(3)}
    for name, keys in parts.items():
        save_safetensors(folder / name, {key: state[key] for key in keys})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, keys in parts.items() for key in keys}}))
    return index


@pytest.mark.parametrize("kind", ["nested", "bare", "legacy", "safetensors", "flat", "shards"])
def test_every_container_gives_the_same_tensors(kind: str, tmp_path: Path) -> None:
    other = {key: tensor + 1 for key, tensor in ORIGINAL.items()}
    both = {"generator": other, "generator_ema": ORIGINAL, "critic": {"x": torch.zeros(2)}, "step": 600}
    flat = {f"{net}.{key}": t for net, state in (("generator", other), ("ema", ORIGINAL)) for key, t in state.items()}
    path, sub_key = {
        "nested": lambda: (save_torch(tmp_path / "a.pt", both), "generator_ema"),
        "bare": lambda: (save_torch(tmp_path / "a.pth", ORIGINAL), None),
        "legacy": lambda: (save_torch(tmp_path / "a.pt", both, legacy=True), "generator_ema"),
        "safetensors": lambda: (save_safetensors(tmp_path / "a.safetensors", ORIGINAL), None),
        "flat": lambda: (save_safetensors(tmp_path / "a.safetensors", flat), "ema"),
        "shards": lambda: (shards(tmp_path, ORIGINAL), None),
    }[kind]()
    same(read_state(path, sub_key), ORIGINAL)


def test_a_sub_key_is_asked_for_and_the_choice_is_shown(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "a.pt", {"generator": ORIGINAL, "critic": {}, "step": 3})
    with pytest.raises(ValueError, match="holds several state dicts: critic, generator; name one of them as sub_key"):
        read_state(path)
    with pytest.raises(ValueError, match="holds no 'generator_ema', but critic, generator, step; change sub_key"):
        read_state(path, "generator_ema")
    with pytest.raises(ValueError, match="'step' is a int, not a state dict"):
        read_state(path, "step")
    with pytest.raises(ValueError, match="entries of critic are no tensors: it is empty"):
        read_state(path, "critic")
    with pytest.raises(ValueError, match="1 entries of the file are no tensors: step"):
        read_state(save_torch(tmp_path / "b.pt", {**ORIGINAL, "step": 3}))


def test_a_pickle_is_refused_in_one_line_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "was here"
    for legacy in (False, True):
        path = save_torch(tmp_path / "a.pt", {"generator": ORIGINAL, "extra": Burglar(mark)}, legacy)
        with pytest.raises(ValueError, match=r"a\.pt is not a whole torch file of tensors and nothing else") as refusal:
            read_state(path, "generator")
        assert "\n" not in str(refusal.value) and not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the burglar would have been there"


@pytest.mark.parametrize("form", [Tensor.to_sparse, lambda t: t.to("meta")])
def test_a_tensor_without_its_numbers_is_refused_in_one_line(form: Callable, tmp_path: Path) -> None:
    key = "patch_embedding.bias"
    with pytest.raises(ValueError, match=rf"1 entries of the file are no tensors: {key}$"):
        read_state(save_torch(tmp_path / "a.pt", {**ORIGINAL, key: form(ORIGINAL[key])}))


def damaged(kind: str, folder: Path) -> Path:
    """Files that are not whole."""
    if kind == "torch":
        path = save_torch(folder / "a.pt", ORIGINAL)
    elif kind == "legacy":
        path = save_torch(folder / "a.pt", ORIGINAL, legacy=True)
    else:
        path = save_safetensors(folder / "a.safetensors", ORIGINAL)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_half_a_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = damaged(kind, tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a whole")) as refusal:
        read_state(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "names 1 shards that are not"),
        (lambda folder: save_safetensors(folder / "model-00002-of-00003.safetensors", {"x": torch.zeros(1)}),
         "00002-of-00003.safetensors and its index differ in"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "is no index"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'), "no index"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../../etc/x.safetensors"}}'), "no safetensors files beside it: ../../etc"),
    ],
)  # fmt: skip
def test_shards_that_do_not_agree_with_their_index_are_refused(change: Callable, said: str, tmp_path: Path) -> None:
    index = shards(tmp_path, ORIGINAL)
    change(tmp_path)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_state(index)


def test_a_file_of_no_known_kind_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("x")
    with pytest.raises(ValueError, match=r"a.gguf is of no known kind; known are \.pt"):
        read_state(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"b.pt is not a file"):
        read_state(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"c.pt holds a list, not a state dict"):
        read_state(save_torch(tmp_path / "c.pt", [torch.zeros(1)]))
