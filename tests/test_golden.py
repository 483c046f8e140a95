"""The golden cases hold, follow their own hyper-parameters, and can fail."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from backbones.history import FullHistory, SinkWindow
from backbones.streaming import WanStreamingGenerator
from tests.golden import b5, b8, l7
from tests.golden.__main__ import FOLDER, main
from tests.golden.backbone import GoldenGenerator
from tests.golden.case import Case, read_case
from tests.golden.runner import KINDS, kind_of, run_case, run_file
from tests.synthetic_golden import packed_case, plans_case, rollout_case, routed_case, spans_of

PACKAGED = [path for path in sorted(FOLDER.glob("*.safetensors")) if kind_of(path) in KINDS]


def packaged(kind: str) -> Case:
    (path,) = (path for path in PACKAGED if kind_of(path) == kind)
    return read_case(path)


def missed(case: Case) -> set[str]:
    """Names of the tensors outside their tolerance."""
    return {row.tensor for row in run_case(case, KINDS[case.name[:2]]).misses}


def save(case: Case, folder: Path, name: str | None = None) -> Path:
    path = folder / f"{name or case.name}.safetensors"
    tensors = {key: tensor.contiguous() for key, tensor in case.tensors.items()}
    save_file(tensors, path, {"case": case.name, "hparams": json.dumps(case.hparams)})
    return path


def with_hparams(case: Case, **changed) -> Case:
    return replace(case, hparams={**case.hparams, **changed})


def with_tensors(case: Case, changed: Mapping[str, Tensor]) -> Case:
    return replace(case, tensors={**case.tensors, **changed})


# The packaged cases hold


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
def test_a_packaged_case_holds(path: Path):
    report = run_file(path)
    assert report.rows and report.misses == []


def test_every_kind_that_is_taken_up_has_a_packaged_case():
    assert {kind_of(path) for path in PACKAGED} == set(KINDS)


# Cases of other sizes and settings hold, by an oracle that shares no code with the backbones


@pytest.mark.parametrize(
    ("kind", "lengths", "steps", "shift", "warp", "sink", "window"),
    [
        ("b1", (1, 2, 2, 2), (1000, 500), 3.0, True, 0, None),
        ("b1", (3, 3), (1000, 750, 500, 250), 8.0, False, 0, None),
        ("b1", (2, 2, 2, 2), (1000, 600), 5.0, True, 1, 5),
        ("b2", (2, 2, 2, 2, 2), (1000, 900, 700, 500, 300, 100), 5.0, True, 1, 5),
        ("b4", (2, 2, 2, 2, 2), (1000, 500), 5.0, True, 3, 7),
    ],
)
def test_a_rollout_of_another_size_holds(kind, lengths, steps, shift, warp, sink, window):
    case, _ = rollout_case(kind, lengths, steps, shift, warp, sink, window, relative=kind == "b4")
    assert missed(case) == set()


@pytest.mark.parametrize(
    ("lengths", "policies"),
    [((2, 2, 2, 2), [(0, None), (1, 1), (0, 2), (2, 0)]), ((1, 2, 2), [(0, None), (1, 1)]), ((3, 2, 2, 2), [(1, 1)])],
)
def test_a_packed_case_of_several_clips_and_policies_holds(lengths, policies):
    assert missed(packed_case(lengths, (833, 250), policies)) == set()


@pytest.mark.parametrize(
    ("block", "start", "history", "sink", "recent", "routes"),
    [
        (2, 9, (1, 5), 1, 2, [(2, 4, 5), (1, 3, 6), (4, 5, 6)]),
        (3, 12, (3, 9), 3, 1, [(4, 9), (5, 10)]),
        (2, 8, (0, None), 0, 0, [(0, 3, 7), (1, 2, 4)]),
        (1, 6, (2, 4), 2, 1, [(3,), (4,), (2,)]),
    ],
)
def test_a_routed_case_of_another_size_holds(block, start, history, sink, recent, routes):
    assert missed(routed_case(block, start, history, sink, recent, routes, 612.5)) == set()


RELEASED = {
    "total": 147, "first": 21, "new": 18, "K": 8, "seed": 42, "X": 7, "P": 5, "sink": 3, "W": 12, "cap": 33, "m": 4
}  # fmt: skip


@pytest.mark.parametrize(
    ("paper", "released"),
    [
        ({"sink": 3, "routed": 5, "recent": 1, "steps": 8, "histories": [12, 30]}, RELEASED),
        (
            {"sink": 1, "routed": 5, "recent": 2, "steps": 2, "histories": [11]},
            {**RELEASED, "total": 120, "first": 12, "new": 12, "K": 3, "seed": 7, "P": 2, "W": 15, "cap": 24, "m": 6},
        ),
        (
            {"sink": 0, "routed": 5, "recent": 4, "steps": 6, "histories": [9, 10]},
            {**RELEASED, "X": 3, "K": 20, "P": 3, "sink": 6, "W": 18, "cap": 45, "m": 3, "seed": 0},
        ),
    ],
)
def test_plans_of_other_settings_hold(paper: dict, released: dict):
    low = paper["sink"]
    examples = {
        "valid": [list(range(low, low + 5))],
        "invalid": [[low, low, low + 1, low + 2, low + 3], [low, low + 1, low + 2, low + 3, -1]],
    }
    case = plans_case(paper, released, examples, [(0, 5), (17, 1000003), (3, 0)])
    assert missed(case) == set()
    assert {"paper.case0.allowed", "released.fetched"} <= {row.tensor for row in run_case(case, KINDS["l7"]).rows}


def test_several_clips_may_share_one_prompt():
    case, _ = rollout_case("b1", (2, 2), (1000, 500), 5.0, True, 0, None, False, batch=1)
    twice = {
        name: torch.cat([tensor, tensor], dim=-5)
        for name, tensor in case.tensors.items()
        if tensor.ndim >= 5 and not name.startswith("weights.")
    }
    assert missed(with_tensors(case, twice)) == set()


# Planted errors miss


@pytest.mark.parametrize(
    ("kind", "changed", "expected"),
    [
        ("b1", {"warp": False}, {"sigmas", "timesteps", "velocity", "x0", "latents", "clean_velocity"}),
        ("b1", {"timestep_shift": 8.0}, {"sigmas", "velocity"}),
        ("b1", {"sink": 0, "window": 9}, {"velocity", "latents", "probe_velocity"}),
        ("b2", {"sink_frames": 0}, {"velocity", "latents"}),
        ("b2", {"window_frames_including_current_block": 15}, {"velocity", "latents"}),
        ("b4", {"window_frames_including_current_block": 9}, {"velocity", "latents"}),
        ("b8", {"recent": 2}, {"velocity_routed"}),
        ("b8", {"sink": 2}, {"velocity_routed"}),
        ("b8", {"history_window": 9}, {"velocity_routed", "velocity_default"}),
        ("l7", {"released": {**RELEASED, "cap": 36}}, {"released.pool", "released.planned", "released.fetched"}),
        ("l7", {"released": {**RELEASED, "seed": 43}}, {"released.fetched", "released.planned"}),
    ],
)
def test_a_wrong_setting_misses(kind: str, changed: dict, expected: set[str]):
    assert missed(with_hparams(packaged(kind), **changed)) >= expected


def test_absolute_positions_miss_the_relative_case_and_only_after_eviction():
    relative = packaged("b4")
    hparams = {**relative.hparams, "probe_policies": []}
    as_absolute = Case("b2_as_absolute", hparams, relative.tensors)
    assert missed(as_absolute) >= {"velocity", "latents", "probe_velocity.sink3_window12"}


def test_a_branch_that_is_shown_another_route_misses(monkeypatch: pytest.MonkeyPatch):
    shown = b8.visible_frames
    monkeypatch.setattr(b8, "visible_frames", lambda case: shown(case)[::-1])
    assert missed(packaged("b8")) == {"velocity_routed"}


def test_routed_keys_at_the_positions_of_their_slots_miss(monkeypatch: pytest.MonkeyPatch):
    def positions(self, visible, start, length):
        return tuple(range(len(visible))), tuple(range(start, start + length))

    monkeypatch.setattr(SinkWindow, "positions", positions)
    assert missed(packaged("b8")) >= {"velocity_routed"}


def test_a_planner_that_allows_other_frames_misses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(l7, "routable", lambda start, sink, recent: tuple(range(sink + 1, start - recent + 1)))
    assert missed(packaged("l7")) >= {"paper.case0.allowed", "paper.case0.example_valid"}
    monkeypatch.undo()
    monkeypatch.setattr(l7, "is_route", lambda frames, pool, count: set(frames) <= set(pool))
    assert "paper.case0.example_invalid" in missed(packaged("l7"))


def test_history_committed_from_a_noisy_pass_misses(monkeypatch: pytest.MonkeyPatch):
    last: list[Tensor] = []

    def predict(self, x, sigma, stream, visible=None):
        if sigma > 0:
            last[:] = [x]
        return WanStreamingGenerator.predict(self, x, sigma, stream, visible)

    def commit(self, x0, stream, visible=None):
        return WanStreamingGenerator.commit(self, last[0], stream, visible)

    monkeypatch.setattr(GoldenGenerator, "predict", predict, raising=False)
    monkeypatch.setattr(GoldenGenerator, "commit", commit, raising=False)
    assert missed(packaged("b1")) >= {"velocity", "latents", "probe_velocity"}


def test_masked_text_padding_misses(monkeypatch: pytest.MonkeyPatch):
    encode = GoldenGenerator.encode_text
    monkeypatch.setattr(GoldenGenerator, "encode_text", lambda self, prompts: encode(self, prompts)[:, :5])
    assert missed(packaged("b1")) >= {"velocity", "latents", "probe_velocity"}


def test_detached_history_misses_the_attached_gradients_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    replay = WanStreamingGenerator.replay
    monkeypatch.setattr(
        GoldenGenerator, "replay", lambda self, probes: replay(self, replace(probes, history_grad=False)), raising=False
    )
    case = packaged("b5")
    assert missed(case) == {name for name in case.tensors if name.startswith("grad.")}


@pytest.mark.parametrize(("kind", "changed"), [("l1", {"beta": 0.2}), ("l1", {"adv_clip_max": 4.0})])
def test_a_wrong_loss_setting_misses(kind: str, changed: dict):
    assert missed(with_hparams(packaged(kind), **changed))


def test_other_advantages_miss():
    case = packaged("l2")
    shuffled = with_tensors(case, {"astrolabe.prompt_id": case["astrolabe.prompt_id"].roll(1)})
    assert missed(shuffled) >= {"astrolabe.advantages", "grpo.advantages", "per_reward.advantages"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_compared_tensor_can_miss(kind: str):
    """Move all expected tensors: each of them must be reported, so none is compared with itself."""
    case = packaged(kind)
    report = run_case(case, KINDS[kind])
    compared = {row.tensor for row in report.rows}
    moved = {
        name: ~case[name] if case[name].dtype == torch.bool else case[name] + 0.01 * (1 + case[name].abs())
        for name in compared
    }
    for name in moved:
        if name.endswith("example_invalid"):  # a verdict, not a number: what moves it is a valid example
            moved[name] = case[name.replace("invalid", "valid")]
    assert missed(with_tensors(case, moved)) == compared


# Windows in chunks


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, 4), st.integers(1, 4), st.integers(1, 7))
def test_a_window_in_chunks_is_a_window_in_frames(sink: int, window: int, length: int, chunks: int):
    spans = spans_of([length] * chunks)
    policy = b5.chunk_policy(sink, window, spans)
    for i, (start, stop) in enumerate(spans):
        seen = {f // length for f in policy.visible(start, stop - start)}
        assert seen == {j for j in range(i) if j < sink or i - j <= window}


def test_one_sink_chunk_and_two_window_chunks_of_three_are_sink_3_window_12():
    assert b5.chunk_policy(1, 2, spans_of([3] * 6)) == SinkWindow(sink=3, window=12)
    assert b5.chunk_policy(0, None, spans_of([3] * 6)) == FullHistory()


def test_chunks_that_no_frame_window_describes_are_refused():
    with pytest.raises(ValueError, match="is no window in frames"):
        b5.chunk_policy(0, 1, spans_of([3, 2, 2, 2]))


# The command


COMPARED = len({row.tensor for row in run_case(packaged("l2"), KINDS["l2"]).rows})


def test_the_command_names_what_it_does_not_take_up_and_succeeds(capsys, tmp_path, monkeypatch):
    save(with_tensors(packaged("l2"), {"later.advantages": torch.zeros(1)}), tmp_path)
    save(packaged("l2"), tmp_path, "q1_later")
    monkeypatch.setattr("tests.golden.runner.LATER", ("q1",))
    monkeypatch.setenv("ARMILLARY_GOLDEN", str(tmp_path))
    monkeypatch.setattr(KINDS["l2"], "NOT_TAKEN_UP", ("later.*",))
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "not taken up: q1" in printed and "not taken up: later.advantages" in printed
    assert f"{COMPARED} tensors compared, 0 outside their tolerance" in printed


def test_a_named_file_of_a_kind_not_taken_up_fails(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.golden.runner.LATER", ("q1",))
    assert main([str(save(packaged("l2"), tmp_path, "q1_later"))]) == 1
    assert "not taken up: q1" in capsys.readouterr().out


def test_an_unknown_kind_fails_even_in_a_folder(capsys, tmp_path, monkeypatch):
    save(packaged("l2"), tmp_path)
    save(packaged("l2"), tmp_path, "q7_mystery")
    monkeypatch.setenv("ARMILLARY_GOLDEN", str(tmp_path))
    assert main([]) == 1
    assert "no known kind: 'q7'" in capsys.readouterr().out


def test_a_moved_number_fails(capsys, tmp_path):
    case = packaged("l2")
    moved = case["grpo.advantages"].clone()
    moved[3] += 1e-6
    assert main([str(save(with_tensors(case, {"grpo.advantages": moved}), tmp_path))]) == 1
    assert "MISS  grpo.advantages" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_expectation_fails(value: float, tmp_path):
    case = packaged("l2")
    moved = case["grpo.advantages"].clone()
    moved[3] = value
    assert main([str(save(with_tensors(case, {"grpo.advantages": moved}), tmp_path))]) == 1


def test_a_tensor_that_nobody_accounts_for_fails(capsys, tmp_path):
    assert main([str(save(with_tensors(packaged("l2"), {"grpo.more": torch.zeros(1)}), tmp_path))]) == 1
    assert "neither compared nor declared as an input: grpo.more" in capsys.readouterr().out


def test_a_missing_tensor_fails(capsys, tmp_path):
    case = packaged("b1")
    without = replace(case, tensors={name: t for name, t in case.tensors.items() if name != "latents"})
    assert main([str(save(without, tmp_path))]) == 1
    assert "has no tensor 'latents'" in capsys.readouterr().out


def test_a_tensor_of_another_shape_fails(tmp_path):
    case = packaged("l2")
    assert main([str(save(with_tensors(case, {"grpo.advantages": torch.zeros(1).double()}), tmp_path))]) == 1


def test_missing_hyper_parameters_fail(capsys, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "l1_bare.safetensors")
    assert main([str(tmp_path / "l1_bare.safetensors")]) == 1
    assert "no hyper-parameters" in capsys.readouterr().out


def test_context_noise_is_refused_rather_than_ignored():
    with pytest.raises(ValueError, match="context_noise"):
        run_case(with_hparams(packaged("b1"), context_noise=5), KINDS["b1"])


def test_an_empty_folder_and_a_missing_file_fail(tmp_path, monkeypatch):
    monkeypatch.setenv("ARMILLARY_GOLDEN", str(tmp_path))
    assert main([]) == 1
    assert main([str(tmp_path / "b1_absent.safetensors")]) == 1


def test_a_corrupted_file_makes_the_command_exit_non_zero(tmp_path):
    whole = save(packaged("l2"), tmp_path)
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}

    broken = tmp_path / "l2_broken.safetensors"
    broken.write_bytes(whole.read_bytes()[:-9])
    arguments = [sys.executable, "-m", "tests.golden", str(whole), str(broken)]
    result = subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"{COMPARED} tensors compared, 0 outside their tolerance, 1 files failed" in result.stdout
    assert "cannot be read as a golden file" in result.stdout and "Traceback" not in result.stderr
