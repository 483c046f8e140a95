"""A checkpoint is whole or refused: what is wrong is named, the one before it is offered, and nothing is unpickled."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from framework import checkpoint
from framework.checkpoint import FORMAT, MANIFEST, CheckpointError, Checkpoints, body_hash, read_part, write_part
from tests.resumed import check_same_state
from tests.support import holds, refuted

STATE = {"weights": {"a": torch.arange(6.0).view(2, 3)}, "age": 3, "average": math.nan}


def checkpoints(root: Path, steps: int = 3, **changes: Any) -> Checkpoints:
    """A run's folder with a checkpoint after each of some steps."""
    made = Checkpoints(root / "checkpoints", **({"keep": 9} | changes))
    for step in range(1, steps + 1):
        made.write(step, {"shared": STATE | {"step": step}}, f"train.seed = 0\n# step {step}\n")
    return made


# states

TENSORS = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    st.integers(0, 99),
)
PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
NAMES = st.text(max_size=3) | st.sampled_from(["$tensor", "$tuple", "$pairs", "$float", "a/b", "a"])
STATES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(NAMES | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


def check_round_trip(read: Callable[[Path], Any], root: Path, state: Any) -> None:
    write_part(root / "state.safetensors", state)
    check_same_state(read(root / "state.safetensors"), state)


def test_what_is_read_is_what_was_written(tmp_path: Path):
    holds(partial(check_round_trip, read_part, tmp_path), STATES, examples=150)


def test_the_round_trip_check_sees_lost_tuples_other_keys_and_other_numbers(tmp_path: Path):
    def through_json(path: Path) -> Any:
        return json.loads(json.dumps(read_part(path), default=lambda tensor: tensor.tolist()))

    refuted(partial(check_round_trip, through_json, tmp_path), STATES)


def test_tensors_that_share_memory_come_back_apart_and_equal(tmp_path: Path):
    base = torch.arange(4.0)
    write_part(tmp_path / "part", {"a": base, "b": base, "half": base[:2], "turned": base.view(2, 2).T})
    read = read_part(tmp_path / "part")
    assert torch.equal(read["a"], read["b"]) and torch.equal(read["turned"], base.view(2, 2).T)
    read["a"] += 1
    assert torch.equal(read["b"], base) and torch.equal(read["half"], base[:2])


@pytest.mark.parametrize("alien", [{1, 2}, object(), b"bytes", torch.float32], ids=lambda a: type(a).__name__)
def test_what_a_checkpoint_cannot_hold_is_named_and_leaves_nothing(alien: object, tmp_path: Path):
    made = checkpoints(tmp_path, 1)
    with pytest.raises(ValueError, match=rf"cannot hold reward\.1, a {type(alien).__name__}"):
        made.write(2, {"shared": {"reward": [0, alien]}}, "")
    assert [path.name for path in sorted(made.root.iterdir())] == ["latest", "step-000001"]


# writing


def test_the_newest_ones_stay_and_latest_names_the_last(tmp_path: Path):
    made = checkpoints(tmp_path, 5, keep=2)
    assert [path.name for path in made.folders()] == ["step-000004", "step-000005"]
    assert (made.root / "latest").read_text() == "step-000005\n"
    assert {path.name for path in made.folders()[0].iterdir()} == {MANIFEST, "config.gin", "shared.safetensors"}
    assert made.verified(made.folders()[0]).step == 4


def test_checkpoints_are_in_the_order_of_steps_beyond_a_million(tmp_path: Path):
    made = Checkpoints(tmp_path, keep=2)
    for step in (999_998, 1_000_000, 2_000_000):
        made.write(step, {"shared": {}}, "")
    assert [path.name for path in made.folders()] == ["step-1000000", "step-2000000"]


class Killed(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("place", ["write_part", "write_manifest", "publish"])
def test_a_process_that_ends_while_it_writes_leaves_the_checkpoints_that_were_there(place: str, tmp_path: Path):
    made = checkpoints(tmp_path, 2)

    def dies(*arguments: Any, **named: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint if place != "publish" else Checkpoints, place, dies)
        patch.setattr(shutil, "rmtree", dies)  # nobody cleans up behind SIGKILL
        made.write(3, {"shared": STATE}, "")
    assert [made.verified(path).step for path in made.folders()] == [1, 2]
    made.write(3, {"shared": STATE}, "")
    assert [path.name for path in sorted(made.root.iterdir())] == ["latest", *(f"step-00000{i}" for i in (1, 2, 3))]


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing_behind(tmp_path: Path):
    made = checkpoints(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(checkpoint, "save_tensors", lambda *a, **k: (_ for _ in ()).throw(OSError("No space left")))
        made.write(2, {"shared": STATE}, "")
    assert [path.name for path in sorted(made.root.iterdir())] == ["latest", "step-000001"]


def test_two_processes_write_their_own_parts_and_the_first_publishes(tmp_path: Path):
    first, second = (Checkpoints(tmp_path, rank=rank, world=2, barrier=lambda: None) for rank in (0, 1))
    # what a barrier does to two processes, in one: the second writes while the first waits for it
    waits = iter([lambda: None, lambda: second.write(4, {"rank-00001": {"own": 1}}, ""), lambda: None])
    Checkpoints(tmp_path, world=2, barrier=lambda: next(waits)()).write(4, {"shared": STATE, "rank-00000": {}}, "")
    manifest = first.verified(first.folders()[0])
    assert manifest.world == 2
    assert set(manifest.files) == {
        "config.gin", "shared.safetensors", "rank-00000.safetensors", "rank-00001.safetensors",
    }  # fmt: skip
    assert read_part(first.folders()[0] / "rank-00001.safetensors") == {"own": 1}


# refusals


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def newer(folder: Path) -> None:
    body = json.loads((folder / MANIFEST).read_text())
    del body["sha256"]
    body["format"] = FORMAT + 1
    (folder / MANIFEST).write_text(json.dumps(body | {"sha256": body_hash(body)}))


def backdated(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"step": 3', '"step": 2'))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda f: cut(f / "shared.safetensors"), r"shared\.safetensors is truncated: \d+ bytes of \d+"),
    "a flipped bit": (lambda f: flip(f / "shared.safetensors"), r"shared\.safetensors is damaged: its hash differs"),
    "a flipped bit of the header": (lambda f: flip(f / "shared.safetensors", 20), "damaged: its hash differs"),
    "longer": (lambda f: (f / "shared.safetensors").open("ab").write(b"x"), r"is damaged: \d+ bytes of \d+"),
    "a missing file": (lambda f: (f / "config.gin").unlink(), r"config\.gin is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), r"is no checkpoint: it holds no manifest\.json"),
    "half a manifest": (lambda f: cut(f / MANIFEST), r"manifest\.json is damaged"),
    "an empty manifest": (lambda f: (f / MANIFEST).write_text("{}"), r"manifest\.json is damaged: 'format'"),
    "no JSON object": (lambda f: (f / MANIFEST).write_text("[]"), r"manifest\.json is damaged"),
    "a changed manifest": (backdated, r"manifest\.json is damaged: its hash differs"),
    "a newer format": (newer, f"written by a newer armillary: its format is {FORMAT + 1}, this version reads {FORMAT}"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_its_cause_and_the_one_before_is_offered(kind: str, tmp_path: Path):
    made = checkpoints(tmp_path)
    harm, cause = DAMAGE[kind]
    last = made.folders()[-1]
    harm(last)
    with pytest.raises(CheckpointError, match=cause) as refused:
        made.verified(last)
    assert f"step-000002 before it is whole: --resume {made.root / 'step-000002'}" in str(refused.value)
    assert "\n" not in str(refused.value)
    flip(made.root / "step-000002" / "shared.safetensors")
    with pytest.raises(CheckpointError, match="step-000001 before it is whole"):
        made.verified(last)
    flip(made.root / "step-000001" / "shared.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint before it is whole; start again"):
        made.verified(last)


def check_every_flip_is_seen(verify: Callable[[Path], Any], folder: Path, place: float) -> None:
    files = sorted(folder.iterdir())
    sizes = [path.stat().st_size for path in files]
    at, i = int(place * sum(sizes)), 0
    while at >= sizes[i]:
        at, i = at - sizes[i], i + 1
    whole = files[i].read_bytes()
    flip(files[i], at)
    try:
        verify(folder)
        found = False
    except CheckpointError:
        found = True
    finally:
        files[i].write_bytes(whole)
    assert found, f"{files[i].name} byte {at}"


def test_any_flipped_bit_is_seen(tmp_path: Path):
    folder = checkpoints(tmp_path, 1).folders()[0]
    holds(partial(check_every_flip_is_seen, checkpoint.verify, folder), st.floats(0, 1, exclude_max=True), examples=200)


def test_the_flip_check_sees_a_verification_of_sizes_alone(tmp_path: Path):
    folder = checkpoints(tmp_path, 1).folders()[0]
    refuted(partial(check_every_flip_is_seen, checkpoint.read_manifest, folder), st.floats(0, 1, exclude_max=True))


def test_a_part_that_is_none_is_refused_and_a_pickle_is_not_opened(tmp_path: Path):
    torch.save({"a": 1}, tmp_path / "pickle")
    (tmp_path / "empty").write_bytes(b"")
    save_file({"a": torch.ones(2)}, tmp_path / "strange")
    for name in ("pickle", "empty", "strange", "missing"):
        with pytest.raises(CheckpointError, match=f"{name} is no part of a checkpoint"):
            read_part(tmp_path / name)


def test_later_checkpoints_are_moved_out_of_the_way_and_kept(tmp_path: Path):
    made = checkpoints(tmp_path)
    for _ in range(2):
        made.set_aside_after(1)
        assert [path.name for path in made.folders()] == ["step-000001"]
        made.write(2, {"shared": STATE}, "")
    made.set_aside_after(1)
    aside = sorted(path.name for path in (made.root / "set-aside").iterdir())
    assert aside == ["step-000002", "step-000002-2", "step-000002-3", "step-000003"]
