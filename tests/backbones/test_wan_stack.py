"""The whole stack in miniature, through the code that loads the released checkpoints: the three papers train on it and
resume exactly, and the real sizes are planned without weights."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from backbones.wan import base_model
from backbones.wan.base_model import base_folder, needed_files
from backbones.wan.generator import WanGenerator
from backbones.wan.generator import generator as wan_generator
from backbones.wan.recipes import stored
from backbones.wan.vae import load_vae
from benchmarks import p6
from framework.adapters import LoRA
from framework.cli import main
from framework.commands.train import train
from framework.config.load import load_config
from framework.devices import is_sizes_only, sizes_only
from framework.evaluation import decode_tape
from framework.kernels import Consistency
from framework.memory_estimate import NetworkDimensions
from framework.rollout import roll_out
from framework.schedules import FewStepSchedule
from framework.weights import read_tensors, save_tensors
from tests.backbones.tiny_stack import (  # noqa: F401
    MIDDLE,
    NETWORK,
    PAPERS,
    lora_lines,
    released_state,
    save_released,
    saved_stack,
    seeded,
    stack_lines,
    tiny_network,
    tiny_recipe,
    tiny_wan_generator,
)
from tests.resumed import check_same_run, die_before, finish, lines, without_pictures  # noqa: F401
from tests.support import group_plans, normal, perturb

PROMPTS = ("a red square moves left", "the blue disc", "a cat", "the dog moves right")
HELD_OUT = ("a disc moves right", "the red cat")
SMALL = (
    "noise_endpoint.NoiseEndpoint.group_size = 2",
    "noise_endpoint.NoiseEndpoint.window_blocks = 2",
    "noise_endpoint.NoiseEndpoint.stream_blocks = 4",
    "causal_history_routing.CausalHistoryRouting.group_size = 2",
    "causal_history_routing.CausalHistoryRouting.routed_frames = 3",
    "causal_history_routing.CausalHistoryRouting.routed_blocks = 1",
    "causal_history_routing.CausalHistoryRouting.tail_blocks = 1",
    "causal_history_routing.CausalHistoryRouting.stream_blocks = 6",
    "adapters.LoRA.rank = 2",
    "evaluation.HeldOut.members = 1",
    "evaluation.HeldOut.blocks = 1",
    "train.prompts_per_step = 1",
    "train.max_steps = 2",
    "train.threads = 1",
)


def write_prompts(folder: Path) -> tuple[str, ...]:
    """Gin lines for prompt files that are written into a folder, and for the pixel reward."""
    for name, prompts in (("train", PROMPTS), ("held_out", HELD_OUT)):
        (folder / f"{name}.txt").write_text("\n".join(prompts), encoding="utf-8")
    return (
        f"scenes.PromptFile.path = {str(folder / 'train.txt')!r}",
        f"held_out/scenes.PromptFile.path = {str(folder / 'held_out.txt')!r}",
        "REWARD = @tiny_stack.PixelReward()",
        "JUDGE = @tiny_stack.PixelReward()",
    )


def of_paper(config: str, stack: Path, folder: Path, *more: str, backbone: str = "") -> Callable[[], dict[str, Any]]:
    """The arguments of a paper's recipe on a released generator in miniature, built anew at every call.

    backbone: another one than `PAPERS` has for it.
    """
    backbone = backbone or PAPERS[config]
    given = [*stack_lines(stack), *lora_lines(backbone), *write_prompts(folder), *more]
    load = partial(load_config, "train", gin_files=[config, backbone], plugins=["tests.backbones.tiny_stack"])
    used = load(gin_params=given).operative_config()
    configured = load(gin_params=[*given, *(line for line in SMALL if line.split(" =")[0] in used)])
    return configured.build


# training


@pytest.mark.slow
@pytest.mark.parametrize(("config", "backbone"), [*PAPERS.items(), *((c, "backbones/krea.gin") for c in PAPERS)])
def test_a_paper_trains_on_the_whole_stack_and_resumes_exactly(
    config: str, backbone: str, stack: Path, tmp_path: Path
) -> None:
    one_sink = ["causal_history_routing.CausalHistoryRouting.sink = 1"]  # all that Krea's history keeps
    more = one_sink if (config, backbone) == ("papers/kvpo.gin", "backbones/krea.gin") else []
    build = of_paper(config, stack, tmp_path, *more, backbone=backbone)
    whole = finish(tmp_path / "whole", build, checkpoint_every=1)
    die_before(1, tmp_path / "cut", build, checkpoint_every=1)
    assert not (tmp_path / "cut" / "adapter").exists()
    check_same_run(finish(tmp_path / "cut", build, checkpoint_every=1), whole)
    trained = read_tensors(whole / "adapter" / "adapter_model.safetensors")
    assert len(trained) == 2 * 20 and all(float(t.abs().max()) > 0 for n, t in trained.items() if "lora_B" in n)
    steps = [line for line in lines(whole) if any(key.startswith("train/") for key in line)]
    assert len(steps) >= 2
    damaged = {name: t + (t != 0) * 1e-7 for name, t in trained.items()}
    save_tensors(whole / "adapter" / "adapter_model.safetensors", damaged)
    with pytest.raises(AssertionError):  # planted: the last bits of some weights
        check_same_run(tmp_path / "cut", whole)


@pytest.mark.slow
@pytest.mark.parametrize("config", PAPERS)
def test_a_paper_takes_its_step_on_a_mid_size_network(
    config: str, stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads of 128 as in the real ones, latents of 16×16: through the same files and the same code."""
    copy = tmp_path / "stack"
    shutil.copytree(stack, copy)
    network = tiny_network(MIDDLE)
    save_released(copy, network)
    sizes = (f"wan.WanRecipe.network = {MIDDLE}", "wan.WanRecipe.latent = (16, 16, 16)")
    assert train(**(of_paper(config, copy, tmp_path, *sizes)() | {"dry_run": True})) is None
    said = capsys.readouterr().out
    assert "one step done, nothing written" in said
    total = sum(p.numel() for p in network.parameters())
    assert total > 3_000_000 and f"of {total + 2 * 3 * (8 * 2 * 256 + 2 * (256 + 1024)):,} parameters" in said


def test_a_paper_trains_on_released_precisions_too(
    stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bfloat16 base under float32 adapters: the default of `wan.generator`, and no looser self-check."""
    build = of_paper("papers/astrolabe.gin", stack, tmp_path)
    arguments = build() | {"dry_run": True}
    arguments["generator"] = wan_generator(tiny_recipe(), str(stack))
    assert train(**arguments) is None
    assert "relative deviation" in capsys.readouterr().out
    network = arguments["generator"].network
    assert {p.dtype for n, p in network.named_parameters() if "lora" in n} == {torch.float32}
    assert network.patch_embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("earliest", [0, 1])
def test_a_layout_that_may_start_at_the_first_block_is_refused_before_the_run(
    earliest: int, stack: Path, tmp_path: Path
) -> None:
    """With seed 1 the self-check and step 0 draw later windows, step 1 draws block 0."""
    layout = ("@noise_endpoint.Anywhere()", f"{earliest}")
    names = ("noise_endpoint.NoiseEndpoint.layout", "noise_endpoint.Anywhere.earliest")
    given = [f"{name} = {value}" for name, value in zip(names, layout, strict=True)]
    arguments = of_paper("papers/astrolabe.gin", stack, tmp_path, *given, "train.seed = 1")() | {"dry_run": True}
    generator = arguments["generator"]
    generator.recipe = replace(generator.recipe, first_schedule=FewStepSchedule((1000,)))
    if earliest:
        assert train(**arguments) is None
        return
    with pytest.raises(ValueError, match=r"window starts at frame 0, .* first_schedule=None$"):
        train(**arguments)


def test_a_run_does_not_go_on_from_other_weights_than_it_started_from(stack: Path, tmp_path: Path) -> None:
    """A checkpoint file that was replaced meanwhile is refused."""
    config = "papers/raven_cm_grpo.gin"
    copy = tmp_path / "stack"
    shutil.copytree(stack, copy)
    build = of_paper(config, copy, tmp_path)
    die_before(1, tmp_path / "cut", build, checkpoint_every=1)
    network = tiny_network()
    perturb(network, seed=9)
    torch.save(released_state(network), copy / "raven_model.pt")
    with pytest.raises(ValueError, match="weights"):
        finish(tmp_path / "cut", build, checkpoint_every=1)


# the generator


@pytest.fixture(scope="module")
def generator(stack: Path) -> WanGenerator:
    """Shared; nobody changes it."""
    return tiny_wan_generator(stack)


def test_the_released_file_becomes_the_network_and_text_rows_reach_it(generator: WanGenerator) -> None:
    for name, tensor in tiny_network().state_dict().items():
        assert torch.equal(generator.network.state_dict()[name], tensor), name
    rows = generator.encode_text(PROMPTS[:2])
    assert rows.shape == (2, 512, NETWORK["text_dim"]) and rows.dtype == torch.float32
    assert generator.dimensions(PROMPTS[0]).text_tokens == 512


def test_a_groups_windows_are_slices_of_each_branchs_whole_video(generator: WanGenerator) -> None:
    """From the rollout's own records: what a reward sees is what a viewer of the whole video sees."""
    plans = group_plans(PROMPTS[:2], branches=2, first_block=1, blocks=1)
    tape = roll_out(generator, plans, Consistency())
    videos = decode_tape(generator, tape)
    (ends,) = tape.records.values()
    whole = torch.cat([ends.prefix.repeat_interleave(2, 0), ends.latents], 2)  # pyright: ignore
    pixels = generator.decode(whole)[:, -12:]
    assert videos.frames.shape == (4, 12, 3, 64, 64)
    assert torch.equal(videos.frames, ((pixels + 1) * 127.5).round().to(torch.uint8))
    decode = generator.decoder()
    streamed = torch.cat([decode(block) for block in whole.split(3, 2)], 1)
    assert torch.equal(streamed[:, -12:], pixels)


def test_a_given_image_becomes_the_first_latent_and_the_stream_goes_on_from_it(generator: WanGenerator) -> None:
    image = normal(0, 1, 1, 3, 64, 64, dtype=torch.float32).clamp(-1, 1)
    first = generator.encode(image)
    assert first.shape == (1, 16, 1, 8, 8)
    x = normal(1, 1, 16, 3, 8, 8, dtype=torch.float32)
    stream = generator.open(PROMPTS[:1])
    with torch.no_grad():
        behind = generator.commit(first, stream)
        assert behind.next_frame == 1
        moved = generator.predict(x, 0.9, behind) - generator.predict(x, 0.9, generator.commit(-first, stream))
    assert float(moved.abs().max()) > 1e-4
    with pytest.raises(ValueError, match="frames of 64 × 64 pixels, the given ones have 32 × 64"):
        generator.encode(image[..., :32, :])
    with pytest.raises(ValueError, match="got 2 frames"):
        generator.encode(image.expand(1, 2, 3, 64, 64))


def test_parts_that_do_not_fit_each_other_are_refused(stack: Path) -> None:
    with pytest.raises(ValueError, match="16 latent channels and 4 frames a latent"):
        tiny_wan_generator(stack, temporal_stride=8)
    with pytest.raises(ValueError, match=r"dtype must be one of float32.*got 'half'"):
        wan_generator(tiny_recipe(), str(stack), dtype="half")
    wide = tiny_wan_generator(stack)
    wide.network.register_to_config(text_dim=48)
    with pytest.raises(ValueError, match=r"32 numbers a token, the network takes 48; set wan\.generator\.text_folder"):
        wide.encode_text(PROMPTS)


def test_precisions_are_recorded_and_are_what_the_configuration_says(stack: Path, tmp_path: Path) -> None:
    files = ["papers/astrolabe.gin", PAPERS["papers/astrolabe.gin"]]
    lines = [*stack_lines(stack), *write_prompts(tmp_path)]
    recorded = load_config("train", gin_files=files, gin_params=lines, plugins=["tests.backbones.tiny_stack"])
    assert "wan.generator.vae_dtype = 'float32'" in recorded.operative_config()
    narrow = wan_generator(tiny_recipe(), str(stack), vae_dtype="bfloat16", gradient_checkpointing=False)
    assert narrow.network.patch_embedding.weight.dtype == torch.bfloat16
    assert narrow.network.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert narrow.vae is not None and narrow.vae.vae.dtype == torch.bfloat16
    assert narrow.encode_text(PROMPTS[:1]).dtype == torch.bfloat16 and narrow.dimensions("a cat").number_bytes == 2
    assert not narrow.network.gradient_checkpointing
    tape = roll_out(narrow, group_plans(PROMPTS[:1], blocks=1), Consistency())
    assert decode_tape(narrow, tape).frames.float().std() > 1


# files


def test_missing_parts_are_one_line_with_repository_and_parameter(stack: Path, tmp_path: Path, monkeypatch) -> None:
    def offline(*given: Any, **more: Any) -> str:
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    copy = tmp_path / "stack"
    shutil.copytree(stack, copy)
    shutil.rmtree(copy / "vae")
    repository = tiny_recipe().base
    for folder, part, parameter in ((copy, "vae", "vae_folder"), (tmp_path / "no", "text_encoder", "text_folder")):
        with pytest.raises(ValueError, match="cannot be had") as said:
            wan_generator(tiny_recipe(), str(folder), text_folder=str(stack) if part == "vae" else None)
        words = (repository, part, f"wan.generator.{parameter}", "no network")
        assert all(word in str(said.value) for word in words) and "\n" not in str(said.value), said.value
    with pytest.raises(ValueError, match=r"nothing\.pt"):
        tiny_wan_generator(stack, file="nothing.pt")
    apart = wan_generator(tiny_recipe(), str(copy), text_folder=str(copy), vae_folder=str(stack))
    assert apart.vae is not None


def test_a_part_is_found_below_its_repositorys_name_and_in_a_snapshot(stack: Path, tmp_path: Path, monkeypatch) -> None:
    below = tmp_path / "Wan2.1-T2V-1.3B-Diffusers"
    shutil.copytree(stack / "vae", below / "vae")
    repository = tiny_recipe().base
    assert base_folder(repository, ("vae",), str(tmp_path), "vae_folder") == below
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **more: asked.update(more) or str(stack))
    assert base_folder(repository, ("text_encoder", "tokenizer"), None, "text_folder") == stack
    assert asked["allow_patterns"] == ["text_encoder/*", "tokenizer/*"]
    with pytest.raises(ValueError, match="has no transformer"):
        base_folder(repository, ("transformer",), None, "folder")


def test_a_partial_or_foreign_autoencoder_is_refused(stack: Path, tmp_path: Path) -> None:
    copy = tmp_path / "stack"
    shutil.copytree(stack / "vae", copy / "vae")
    (path,) = (copy / "vae").glob("*.safetensors")
    tensors = read_tensors(path)
    whole = load_vae(copy, torch.float32)
    assert all(torch.equal(value, tensors[name]) for name, value in whole.state_dict().items())
    taken = dict(list(tensors.items())[3:])
    for wrong in (taken, {**tensors, "extra.weight": torch.zeros(1)}):
        save_tensors(path, wrong, {"format": "pt"})
        with pytest.raises(ValueError, match=r"vae does not fit AutoencoderKLWan|holds no autoencoder") as said:
            load_vae(copy, torch.float32)
        assert "\n" not in str(said.value)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no autoencoder"):
        load_vae(copy, torch.float32)


# real sizes without weights

SIZES = {"backbones/longlive.gin": 1_418_996_800, "backbones/krea.gin": 14_288_491_584}
"""Parameters of the networks, as Wan 2.1's model cards round them: 1.3B and 14B."""
TRAINED = {"backbones/longlive.gin": 349_962_240, "backbones/krea.gin": 1_226_833_920}
"""Those of adapters of rank 256 on every linear layer of the blocks."""


def planned(backbone: str, folder: Path) -> list[str]:
    given = [*write_prompts(folder), "train.prompts_per_step = 4", "train.groups_at_once = 1"]
    files = ["--gin_file", "papers/astrolabe.gin", "--gin_file", backbone, "--plugin", "tests.backbones.tiny_stack"]
    return [*files, *(word for line in given for word in ("--gin_param", line))]


@pytest.mark.parametrize("backbone", SIZES)
def test_a_dry_run_of_the_real_sizes_needs_no_weights(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *planned(backbone, tmp_path), "--dry_run", "--device", "meta"]) == 0
    out, err = capsys.readouterr()
    said = out + err
    total = SIZES[backbone] + TRAINED[backbone]
    assert f"trainable: {TRAINED[backbone]:,} of {total:,} parameters" in said
    assert "weights: to be fetched from https://huggingface.co/" in said and "licence" in said
    assert "memory of 1 GPU: about" in said and "memory of each of 4 GPUs: about" in said
    assert "no self-check and no step" in said and not (tmp_path / "runs").exists()
    assert main(["train", *planned(backbone, tmp_path), "--device", "meta"]) == 1
    assert "only doctor and train --dry_run take it" in capsys.readouterr().err


@pytest.mark.parametrize("backbone", SIZES)
def test_doctor_estimates_the_real_sizes_without_weights(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--output_dir", str(tmp_path / "run")]
    assert main(["doctor", *planned(backbone, tmp_path), "--device", "meta", *place]) == 0
    out, err = capsys.readouterr()
    for words in (f"of which {TRAINED[backbone]:,} train", "memory: about", "frozen weights", "to be fetched from"):
        assert words in out + err
    assert not (tmp_path / "run").exists() and not is_sizes_only()


def test_what_would_be_read_says_where_it_lies(stack: Path) -> None:
    where = list(needed_files(tiny_recipe(), str(stack), str(stack), None))
    assert where[0].endswith(f"weights: {stack / 'self_forcing_dmd.pt'}")
    assert str(stack / "text_encoder") in where[1] and "to be fetched" in where[2] and base_model.LICENCE in where[2]


def test_a_generator_of_sizes_alone_has_no_numbers(stack: Path) -> None:
    with sizes_only():
        generator = tiny_wan_generator(stack)
    assert {p.device.type for p in generator.network.parameters()} == {"meta"}
    assert generator.encode_text(PROMPTS).shape == (4, 512, NETWORK["text_dim"])
    with pytest.raises(ValueError, match="sizes alone"):
        generator.decode(torch.zeros(1, 16, 1, 8, 8))
    real = tiny_wan_generator(stack)
    assert real.dimensions("a cat") == generator.dimensions("a cat")


@pytest.mark.slow
def test_a_narrow_checkpointed_network_takes_the_memory_that_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As P6 compares it, on a network with the precisions of a released one; adapters stay float32."""
    wide = p6.random_generator

    def narrow(config):
        generator = wide(config)
        for name, parameter in generator.network.named_parameters():
            parameter.data = parameter.data.to(stored(name, torch.bfloat16))
        generator.network.enable_gradient_checkpointing()
        sizes: NetworkDimensions = generator.dimensions("a red square moves right slowly")
        generator.dimensions = lambda prompt: replace(sizes, number_bytes=2, checkpointing=True)
        return generator

    case = replace(p6.cases()[0], adaptation=LoRA(16))
    monkeypatch.setattr(p6, "random_generator", narrow)
    (guess, _), found = p6.estimated(case), p6.measured(case)
    assert p6.off(guess, found) < 0.1, (guess, found)
    monkeypatch.setattr(p6, "random_generator", wide)
    assert p6.off(p6.estimated(case)[0], found) > 0.5, "planted: the estimate of a wide network that keeps everything"
