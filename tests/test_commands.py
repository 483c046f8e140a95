"""The real commands on the packaged generator: what they write, and how they refuse what a user can get wrong."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from framework.cli import main
from framework.config.load import packaged_configs
from framework.reporting.metrics import read_metrics
from framework.reporting.runfolder import typed

SMALL = [
    "--gin_param", "evaluation.HeldOut.members = 1",
    "--gin_param", "evaluation.HeldOut.every = 0",
    "--gin_param", "held_out/scenes.ShapesCaptions.limit = 3",
    "--gin_param", "noise_endpoint.NoiseEndpoint.window_blocks = 2",
    "--gin_param", "noise_endpoint.NoiseEndpoint.group_size = 2",
    "--gin_param", "train.prompts_per_step = 2",
]  # fmt: skip


def train(folder: Path, *more: str, config: str = "embedded/nft.gin") -> int:
    return main(["train", "--gin_file", config, "--output_dir", str(folder), "--max_steps", "2", *SMALL, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "nft"
    assert train(folder) == 0
    return folder


@pytest.mark.parametrize(
    ("program", "written"),
    [
        ("/home/me/env/bin/armillary", "armillary train"),
        ("/home/me/src/framework/__main__.py", "python -m framework train"),
        ("/home/me/mine.py", "/home/me/mine.py train"),
    ],
)
def test_a_recorded_command_does_not_tell_where_the_program_lies(
    program: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, "train"])
    assert " ".join(typed()) == written


def test_a_run_leaves_everything_that_a_person_looks_for(run: Path) -> None:
    for name in (
        "config.gin", "command.txt", "env.json", "metrics.jsonl", "gains.md", "evaluation.safetensors", "summary.json",
        "reward_curve.png", "before_after.png", "before_after.mp4", "before_after.gif",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "samples/step_000002/00.mp4",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    with Image.open(run / "before_after.gif") as film:
        assert film.n_frames > 1
    assert Image.open(run / "before_after.png").width > 400


def test_the_event_file_holds_scalars_the_configuration_and_a_moving_picture(run: Path) -> None:
    events = EventAccumulator(str(run / "tb"), size_guidance={"images": 0})
    events.Reload()
    assert {"train/loss", "train/grad_norm", "reward/VQ/mean", "eval/reward/total"} <= set(events.Tags()["scalars"])
    (film,) = events.Images("samples/video")
    assert film.encoded_image_string[:4] == b"GIF8"
    text = events.Tensors("config/operative/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "nft.NFT" in text


def test_metrics_are_finite_and_carry_samples_seen(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert [line["samples_seen"] for line in steps] == [4, 8]
    assert all(torch.isfinite(torch.tensor(value)) for line in lines for value in line.values())


def test_equal_seeds_give_equal_metrics_but_for_time(run: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "again") == 0

    def timeless(path: Path) -> list[dict[str, float]]:
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(path)]

    assert timeless(run / "metrics.jsonl") == timeless(tmp_path / "again" / "metrics.jsonl")
    assert train(tmp_path / "other", "--seed", "1") == 0
    assert timeless(run / "metrics.jsonl") != timeless(tmp_path / "other" / "metrics.jsonl")


def test_the_operative_configuration_gives_the_run_again(run: Path, tmp_path: Path) -> None:
    arguments = ["train", "--gin_file", str(run / "config.gin"), "--output_dir", str(tmp_path / "replay")]
    assert main(arguments) == 0
    first, second = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (run, tmp_path / "replay"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_saved_adapter_is_what_was_evaluated(run: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "--gin_file", "embedded/evaluate.gin", "--output_dir", str(tmp_path / "scores"),
                 "--adapter", str(run / "adapter"), *SMALL[:2], *SMALL[4:6]]  # fmt: skip
    assert main(arguments) == 0
    scores, recorded = load_file(tmp_path / "scores" / "scores.safetensors"), load_file(run / "evaluation.safetensors")
    for name, value in scores.items():
        torch.testing.assert_close(value, recorded[f"after.{name}"], atol=1e-5, rtol=0)
        assert not torch.equal(recorded[f"before.{name}"], recorded[f"after.{name}"])


def test_generate_writes_a_video_per_prompt_with_the_adapter(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves left slowly\n\n  a cyan square moves up quickly  \n")
    arguments = ["generate", "--gin_file", "embedded/generate.gin", "--output_dir", str(tmp_path / "videos"),
                 "--prompt_file", str(prompts), "--adapter", str(run / "adapter")]  # fmt: skip
    assert main(arguments) == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


@pytest.mark.parametrize("config", [c for c in packaged_configs() if c.startswith("embedded/nft")])
def test_every_packaged_training_configuration_runs(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--gin_file", config, "--output_dir", "nowhere", "--dry_run", *SMALL]) == 0
    assert "replay of a stored rollout" in capsys.readouterr().out
    assert not Path("nowhere").exists()


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line that a refused command printed."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert code != 0
    assert "Traceback" not in out + err
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("nft.NFT.bta = 1.0", ["nft.NFT", "bta", "beta"]),
        ("SURROGATE = @nft.NFTT()", ["NFTT", "nft.NFT"]),
        ("gaussian.Kernel.scale = 1", ["gaussian.Kernel"]),
        ("velocity_kl.VelocityKL.weight = 0.1", ["velocity_kl.VelocityKL", "weight"]),
        ("optimization.AdamW.learning_rate = 'fast'", ["learning_rate", "fast"]),
        ("nft.NFT.level_weights = (1, 1)", ["level_weights", "4"]),
        ("adapters.LoRA.target_modules = ('to_nothing',)", ["target_modules", "to_nothing", "to_q"]),
        ("noise_endpoint.NoiseEndpoint.window_blocks = 0", ["window_blocks"]),
        ("train.prompts_per_step = 1000", ["prompts_per_step", "1000"]),
        ("train.micro_batch_size = 3", ["micro_batch_size=3", "group size"]),
        ("train.device = 'nowhere'", ["device='nowhere'", "--device"]),
        ("adapters.LoRA.rank = 0", ["LoRA.rank"]),
        ("advantages.PerRewardCentred.weights = {'XX': 1.0}", ["XX", "VQ"]),
        ("held_out/scenes.ShapesCaptions.limit = 1", ["at least 2"]),
        ("embedded.packaged_generator.checkpoint = 'nowhere.safetensors'", ["checkpoint", "nowhere.safetensors"]),
    ],
)
def test_a_wrong_binding_is_one_line_that_names_it(
    binding: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--gin_param", "noise_endpoint.NoiseEndpoint.group_size = 4"] if "micro_batch" in binding else []
    line = refusal(capsys, train(tmp_path / "run", *more, "--gin_param", binding))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists(), "a refused run must leave its folder free"


def test_a_folder_of_another_run_is_refused_and_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    line = refusal(capsys, train(run))
    assert "output_dir" in line
    assert before == {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    line = refusal(capsys, train(tmp_path / "file" / "run"))
    assert "output_dir" in line


def test_an_empty_prompt_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("\n \n")
    arguments = ["generate", "--gin_file", "embedded/generate.gin", "--output_dir", str(tmp_path / "videos")]
    line = refusal(capsys, main([*arguments, "--prompt_file", str(tmp_path / "prompts.txt")]))
    assert "prompt" in line and "empty" in line
    assert not (tmp_path / "videos").exists()


@pytest.mark.parametrize("kind", ["foreign", "broken"])
def test_a_foreign_checkpoint_is_refused_whole(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"something.weight": torch.ones(2)}, path) if kind == "foreign" else path.write_bytes(b"not tensors")
    line = refusal(
        capsys, train(tmp_path / "run", "--gin_param", f"embedded.packaged_generator.checkpoint = {str(path)!r}")
    )
    assert "other.safetensors" in line
    assert not (tmp_path / "run").exists()


def test_the_controls_and_the_derived_batch_are_printed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "shown", "--max_steps", "1") == 0
    out = capsys.readouterr().out
    assert "2 prompts × 2 branches = 4 clips" in out
    assert "trainable:" in out and "LoRA rank" in out
    assert all(name in out for name in ("ceiling", "wrong caption", "shuffled", "static", "blank", "noise"))
    assert json.loads((tmp_path / "shown" / "summary.json").read_text())["steps"] == 1
