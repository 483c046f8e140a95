"""The golden command takes the rewards folder's JSON files, other sizes and ids included; every entry can miss."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.__main__ import FOLDER, main
from tests.golden.rewards import check_file, find_check, read_json
from tests.golden.tiny_qwen import MODELS, Setup, fill, multimodal_positions

PACKAGED = FOLDER / "rewards"
OTHER = {
    "text": {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 3,
             "num_key_value_heads": 1, "vocab_size": 340, "rms_norm_eps": 1e-6},
    "vision": {"depth": 1, "embed_dim": 24, "num_heads": 3},
    "tokens": {"image": 321, "video": 320, "pad": 339, "VQ": 331, "MQ": 330, "TA": 335, "reward": 300},
    "lora": {"rank": 3, "alpha": 9},
    "videoalign": {"rows": [
        {"frame_seed": 5, "shape": [2, 28, 56], "text_seed": 6, "text_tokens": 30},
        {"frame_seed": 7, "shape": [4, 56, 28], "text_seed": 8, "text_tokens": 29},
        {"frame_seed": 9, "shape": [2, 84, 28], "text_seed": 1, "text_tokens": 50},
    ]},
    "hpsv3": {"rows": [{"frame_seed": 5, "shape": [84, 28], "text_seed": 6, "text_tokens": 21}]},
}  # fmt: skip
"""A file's own setup: other sizes, ids, adapters, seeds and numbers of rows."""


def scores_of(setup: Setup, model: str, wrong: bool = False) -> list:
    """By a scorer whose weights were put in place by hand: no loader, no adapters, one row at a time."""
    reward = setup.build(model)
    patches, grids = setup.patches(model)
    rows = setup.token_rows(model, grids)
    by_name = {**reward.backbone.state_dict()}
    for name, tensor in by_name.items():
        stem = name.removesuffix(".weight")
        tensor.copy_(fill(name, tensor.shape))
        if model == "videoalign" and name.startswith("language_model.layers") and tensor.ndim == 2:
            down = fill(f"{stem}.lora_A.weight", (setup.lora.rank, tensor.shape[1]))
            up = fill(f"{stem}.lora_B.weight", (tensor.shape[0], setup.lora.rank))
            tensor += setup.lora.alpha / setup.lora.rank * up @ down
    positions = multimodal_positions(reward, rows, grids) if wrong else None
    return reward(rows, patches, grids, positions).tolist()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scores file of another setup."""
    setup = Setup.of({"config": OTHER})
    document: dict[str, Any] = {"transformers": "other", "config": OTHER}
    for model in MODELS:
        document[model] = scores_of(setup, model)
        document[f"{model}_if_mrope_WRONG"] = scores_of(setup, model, wrong=True)
        document[f"{model}_pixel_sum"] = float(setup.patches(model)[0].double().sum())
    return save(document, tmp_path_factory.mktemp("other") / "another_golden.json")


def save(document: dict, path: Path) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def missed(path: Path) -> set[str]:
    return {row.tensor for row in check_file(path) if not row.passed}


@pytest.mark.parametrize("name", ["rewards_golden", "rewards_golden_extra", "preprocess_golden"])
def test_a_packaged_file_holds(name: str):
    assert missed(PACKAGED / f"{name}.json") == set()


def test_a_file_of_other_sizes_ids_adapters_and_seeds_holds(other: Path):
    rows = check_file(other)
    assert [row for row in rows if not row.passed] == [] and {row.tensor for row in rows} >= {*MODELS}


@pytest.mark.parametrize(
    ("changed", "entries"),
    [
        ({"lora": {"rank": 3, "alpha": 6}}, {"videoalign", "videoalign_if_mrope_WRONG"}),
        ({"text": OTHER["text"] | {"rms_norm_eps": 1e-3}}, {*MODELS, *(f"{model}_if_mrope_WRONG" for model in MODELS)}),
    ],
)
def test_another_setup_than_the_files_misses(changed: dict, entries: set[str], other: Path, tmp_path: Path):
    document = read_json(other)
    document["config"] = OTHER | changed
    assert missed(save(document, tmp_path / "changed.json")) == entries


def test_sizes_that_a_file_does_not_say_are_read_off_its_key_list(tmp_path: Path):
    """Only what shapes cannot say is left to be said: numbers of heads, token ids and alpha."""
    setup = Setup.of({"config": OTHER})
    grids = {model: setup.patches(model)[1] for model in MODELS}
    extra = {
        model: {
            "grid_thw": grids[model],
            "input_ids": setup.token_rows(model, grids[model]),
            "parameters": {key: [list(t.shape), None] for key, t in setup.checkpoint(model).items()},
        }
        for model in MODELS
    }
    said = {
        "text": {"num_attention_heads": 3, "num_key_value_heads": 1},
        "vision": {"num_heads": 3},
        "lora": {"alpha": 9},
    }
    read = Setup.of({**extra, "config": said | {name: OTHER[name] for name in ("tokens", "videoalign", "hpsv3")}})
    for model in MODELS:
        assert read.checkpoint(model).keys() == setup.checkpoint(model).keys()
        assert all(t.shape == setup.checkpoint(model)[key].shape for key, t in read.checkpoint(model).items())
    assert read.lora == setup.lora and read.vision == setup.vision


def moved(value: Any) -> Any:
    """Every number moved a little, every text changed, lists and tables kept."""
    if isinstance(value, dict):
        return {key: moved(entry) if entry is not None else None for key, entry in value.items()}
    if isinstance(value, list):
        return [moved(entry) if entry is not None else None for entry in value]
    if isinstance(value, str):
        return f"{value}x"
    return value + 1 if isinstance(value, int) else value + 1e-3 * max(1.0, abs(value))


@pytest.mark.parametrize("name", ["rewards_golden", "rewards_golden_extra"])
def test_every_entry_can_miss(name: str, tmp_path: Path):
    """None is compared with itself: the setup of the file stays, one entry after the other is moved."""
    document = read_json(PACKAGED / f"{name}.json")
    setup = Setup.of(read_json(PACKAGED / "rewards_golden_extra.json"))
    built: dict = {}
    for entry, value in document.items():
        if entry == "transformers":
            continue
        parts = {(entry, part) for part in value} if isinstance(value, dict) else {(entry, None)}
        for entry, part in parts:
            wrong = moved(value) if part is None else {**value, part: moved(value[part])}
            check = find_check(entry, value)
            assert check is not None
            failed = {row.tensor for row in check(entry, wrong, setup, built) if not row.passed}
            assert failed == {entry if part is None else f"{entry}.{part}"}


def test_every_preprocessing_table_can_miss(tmp_path: Path):
    document = read_json(PACKAGED / "preprocess_golden.json")
    for entry in document:
        wrong = copy.deepcopy(document)
        if entry.startswith("smart"):
            wrong[entry][3][2] += 28
        elif entry == "resize_and_gray":
            wrong[entry][1]["gray"] |= {"sha256": "0", "sum": wrong[entry][1]["gray"]["sum"] * 2}
        else:
            wrong[entry][0]["indices"][1] += 1
        assert missed(save(wrong, tmp_path / "wrong.json")) == {"resize_and_gray.1.gray" if entry[0] == "r" else entry}


def test_the_command_takes_a_folder_with_scores_and_fails_on_a_moved_one(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "rewards").mkdir()
    document = {key: value for key, value in read_json(other).items() if key.startswith(("hpsv3", "config"))}
    file = save(document, tmp_path / "rewards" / "another_golden.json")
    save({"title": "of nothing"}, tmp_path / "manifest.json")
    monkeypatch.setenv("ARMILLARY_GOLDEN", str(tmp_path))
    for arguments in ([], [str(tmp_path)], [str(tmp_path / "rewards")], [str(file)]):
        assert main(arguments) == 0
        assert "3 tensors compared, 0 outside" in capsys.readouterr().out
    assert main([]) == 0 and "not taken up: manifest.json" in capsys.readouterr().out
    document["hpsv3"][0][0] += 1e-4
    save(document, file)
    assert main([]) == 1 and "MISS  hpsv3 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"hpsv3_pixel_sum": 0.0, "hpsv3_more": 1}, "neither compared nor declared as an input: hpsv3_more"),
        ({"hpsv3": {"more": 1}}, "hpsv3.more"),
        ({"hpsv3": [[1.0]]}, "MISS"),
    ],
)
def test_what_nobody_accounts_for_and_other_shapes_fail(document: dict, message: str, tmp_path: Path, capsys):
    assert main([str(save(document, tmp_path / "x.json"))]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"uniform_2fps": [{"T": 81, "fps": 16, "max_frames": 6, "indices": [0]}]}, "uniform_2fps: ['max_frames']"),
        ({"uniform_2fps": []}, "uniform_2fps is empty"),
        ({"resize_and_gray": []}, "resize_and_gray is empty"),
        ({"smart_resize_others": [[1, 2, 3, 4]]}, "neither compared nor declared as an input: smart_resize_others"),
        ({"hpsv3_pixel_sum": 0.0, "config": {"lora": {"factor": 2}}}, "nothing reads: ['lora.factor']"),
        ({"resize_and_gray": [{"input": "x", "seed": 1, "shape": [1, 3, 2, 2], "to": [2, 2]}]}, "unknown kind 'x'"),
    ],
)
def test_what_would_be_skipped_fails(document: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(save(document, tmp_path / "x.json"))]) == 1
    assert message in capsys.readouterr().out


def test_tables_with_other_rates_and_refusals_are_taken(tmp_path: Path):
    table = {
        "uniform_4fps": [{"T": 17, "fps": 8, "indices": [0, 2, 5, 7, 9, 11, 14, 16]}],
        "explicit_nframes": [
            {"T": 81, "nframes": 1, "indices": "ValueError"},
            {"T": 9, "nframes": 3, "indices": [0, 3, 5, 8]},
        ],
        "multi_pts": [{"T": 5, "fps": 16, "indices": "ValueError"}],
        "smart_resize_hpsv3": [[10, 2001, "ValueError"], [30, 30, 448, 448]],
    }
    assert missed(save(table, tmp_path / "x.json")) == set()
    table["explicit_nframes"][0]["indices"] = [0]
    table["smart_resize_hpsv3"][1] = [30, 30, "ValueError"]
    assert missed(save(table, tmp_path / "x.json")) == {"explicit_nframes", "smart_resize_hpsv3"}


def test_a_file_that_is_no_table_fails(tmp_path: Path, capsys: pytest.CaptureFixture):
    for text in ("{", "[]"):
        (tmp_path / "x.json").write_text(text)
        assert main([str(tmp_path / "x.json")]) == 1
        assert "cannot be read as a golden file" in capsys.readouterr().out
