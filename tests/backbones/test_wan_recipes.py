"""Recipes: what the configurations of the released checkpoints say, where files are found, and the loaded network."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from backbones.history import FullHistory, SinkWindow
from backbones.memory_bank import MemoryBank
from backbones.recache import JointRecache
from backbones.recompute import RecomputedWindow
from backbones.wan import recipes
from backbones.wan.hub import find_file
from backbones.wan.recipes import WAN_1_3B, WAN_14B, ReleasedLoRA, WanRecipe, load_network, stored
from framework.config.load import load_config, packaged_configs, packaged_folder
from framework.schedules import FewStepSchedule
from tests.backbones.micro import micro_config
from tests.backbones.wan_files import (
    ALPHA,
    OUTSIDE,
    RANK,
    lora,
    network,
    originals,
    ours,
    outputs,
    save_safetensors,
    save_torch,
)
from tests.support import close

NAMES = ("self_forcing", "causal_forcing", "causal_forcing_framewise", "longlive", "longlive_infinity", "memflow",
         "raven", "raven_cm_grpo", "krea")  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """No test reaches the network; what would have been fetched is listed."""
    asked: list[tuple[str, str]] = []

    def nothing(repository: str, file: str) -> str:
        asked.append((repository, file))
        raise LocalEntryNotFoundError("offline, and the file is not in the cache\nwith a second line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", nothing)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: None)
    yield asked


# The packaged configurations


def recipe_of(name: str, monkeypatch: pytest.MonkeyPatch, *params: str) -> WanRecipe:
    """The recipe that a configuration describes, with nothing built around it."""
    monkeypatch.setattr("backbones.wan.generator.load_network", lambda *_: pytest.fail("nothing is loaded here"))
    given = ["generate.generator = %RECIPE", *params]
    bindings = load_config("generate", gin_files=[f"backbones/{name}.gin"], gin_params=params).bindings
    assert "wan.generator" in {key.name for key in bindings.table}
    monkeypatch.setattr("framework.config.bindings.fits", lambda value, annotation: True)
    return load_config("generate", gin_files=[f"backbones/{name}.gin"], gin_params=given).build()["generator"]


LONGLIVE_LORA = ReleasedLoRA("Efficient-Large-Model/LongLive-1.3B", "models/lora.pt", "generator_lora", 256, 256.0)
FOUR, WHOLE = FewStepSchedule(), FewStepSchedule(integer_timesteps=True)
TABLE = {
    "self_forcing": dict(repository="gdhe17/Self-Forcing", sub_key="generator_ema", policy=FullHistory()),
    "causal_forcing": dict(repository="zhuhz22/Causal-Forcing", sub_key="generator", policy=FullHistory()),
    "causal_forcing_framewise": dict(
        repository="zhuhz22/Causal-Forcing", sub_key="generator_ema", policy=FullHistory(), block_frames=1,
        clip_blocks=21, schedule=FewStepSchedule((1000, 500)), first_schedule=FOUR,
    ),
    "longlive": dict(
        policy=SinkWindow(3, 12), lora=(LONGLIVE_LORA,), recache=JointRecache(), sub_key="generator",
    ),
    "longlive_infinity": dict(policy=SinkWindow(3, 12, relative=True), lora=(LONGLIVE_LORA,), sub_key="generator"),
    "memflow": dict(
        repository="KlingTeam/MemFlow", policy=MemoryBank(3, 12, 3, 3),
        lora=(replace(LONGLIVE_LORA, repository="KlingTeam/MemFlow", file="lora.pt"),),
    ),
    "raven": dict(repository="mvp-lab/RAVEN", sub_key=None, policy=FullHistory(), schedule=WHOLE, lora=()),
    "raven_cm_grpo": dict(
        lora=(ReleasedLoRA("mvp-lab/RAVEN", "cmgrpo_raven_lora.safetensors", embeddings=True),), schedule=WHOLE,
    ),
    "krea": dict(
        repository="krea/krea-realtime-video", network=WAN_14B, policy=RecomputedWindow(3), sub_key=None,
        base="Wan-AI/Wan2.1-T2V-14B-Diffusers", schedule=FewStepSchedule((1000, 666, 333)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_says_what_the_release_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(name, monkeypatch)
    expected = {
        "block_frames": 3, "clip_blocks": 7, "latent": (16, 60, 104), "schedule": FOUR, "first_schedule": None,
        "network": WAN_1_3B, "fps": 16.0, "temporal_stride": 4, "base": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        **TABLE[name],
    }  # fmt: skip
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.name == name.replace("_", "-") if name != "krea" else recipe.name == "krea-realtime"
    frames = recipe.block_frames * recipe.clip_blocks
    assert frames == 21 and recipe.licence
    made = recipe.generator_recipe()
    assert (made.name, made.licence, made.first_schedule) == (recipe.name, recipe.licence, recipe.first_schedule)
    assert recipe.repository in made.source and made.pixels_before(frames) == 81


def test_every_packaged_configuration_is_in_the_table_and_short() -> None:
    files = {name for name in packaged_configs() if name.startswith("backbones/")}
    assert files == {f"backbones/{name}.gin" for name in (*NAMES, "shared")}
    for name in files:
        lines = (packaged_folder() / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 20 and lines[0].startswith("# "), name


def test_weights_that_are_not_for_everybody_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("raven", "raven_cm_grpo"):
        assert "NON-COMMERCIAL" in recipe_of(name, monkeypatch).licence
        assert "NON-COMMERCIAL" in (packaged_folder() / f"backbones/{name}.gin").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["astrolabe", "kvpo", "raven_cm_grpo", "flow_grpo"])
def test_every_method_goes_with_every_checkpoint_in_either_order(method: str) -> None:
    shapes = ["REWARD = @shapes.ShapesReward()", "JUDGE = @shapes.ShapesReward()", "SCENES = @scenes.ShapesCaptions()",
              "HELD_OUT = @held_out/scenes.ShapesCaptions()"]  # fmt: skip
    for name in NAMES:
        files = [f"papers/{method}.gin", f"backbones/{name}.gin"]
        first, second = (load_config("train", gin_files=order, gin_params=shapes) for order in (files, files[::-1]))
        assert first.operative_config() == second.operative_config()


# Where files are found


@pytest.mark.parametrize("place", ["sub/a.pt", "a.pt", "repo/sub/a.pt", "owner/repo/sub/a.pt", "repo/a.pt"])
def test_a_local_folder_comes_first(place: str, tmp_path: Path, offline: list) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("")
    assert find_file("owner/repo", "sub/a.pt", str(tmp_path)) == tmp_path / place
    assert offline == []


def test_a_name_that_many_parts_of_a_model_have_is_not_taken_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vae/config\.json of owner/repo cannot be had"):
        find_file("owner/repo", "vae/config.json", str(tmp_path))


def test_a_download_says_the_licence_and_the_cache_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file: f"/hub/{repository}/{file}")
    assert find_file("owner/repo", "a.pt", None, "CC-BY-NC-4.0") == Path("/hub/owner/repo/a.pt")
    said = capsys.readouterr()
    assert "fetching a.pt of https://huggingface.co/owner/repo, licence: CC-BY-NC-4.0" in said.out + said.err
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: "/cache/a.pt")
    assert find_file("owner/repo", "a.pt", None, "CC-BY-NC-4.0") == Path("/cache/a.pt")
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_offline_one_line_names_the_file_the_repository_and_the_parameter(tmp_path: Path) -> None:
    for folder in (None, str(tmp_path)):
        with pytest.raises(ValueError) as refusal:
            find_file("owner/repo", "sub/a.pt", folder)
        message = str(refusal.value)
        assert "\n" not in message and "sub/a.pt of owner/repo cannot be had" in message
        assert "as the parameter folder" in message and (folder is None or repr(folder) in message)


@pytest.mark.parametrize("file", ["../a.pt", "/etc/passwd", "a/../../b.pt", ""])
def test_a_path_outside_of_the_repository_is_refused(file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no path inside the repository owner/repo"):
        find_file("owner/repo", file, str(tmp_path))


# Networks


MICRO = WanRecipe("micro", "owner/repo", "a.pt", "ours", sub_key="generator_ema", network=micro_config())


@pytest.mark.parametrize(("sizes", "count"), [(WAN_1_3B, 825), (WAN_14B, 1095)])
def test_the_meta_device_gives_the_real_sizes_without_a_file(sizes: dict, count: int, offline: list) -> None:
    made = load_network(replace(MICRO, network=sizes), None, torch.bfloat16, "meta")
    assert len(made.state_dict()) == count and {p.device.type for p in made.parameters()} == {"meta"}
    assert offline == []


def folder_with(tmp_path: Path, **state: object) -> str:
    save_torch(tmp_path / "a.pt", {"generator": {}, "generator_ema": originals(ours()), **state})
    return str(tmp_path)


def test_a_network_is_loaded_from_a_folder_and_owns_its_weights(tmp_path: Path) -> None:
    made = load_network(MICRO, folder_with(tmp_path), torch.float32, "cpu")
    close(outputs(made), outputs(network()), 0)
    (tmp_path / "a.pt").write_bytes(b"gone")
    close(outputs(made), outputs(network()), 0)
    assert all(p.requires_grad and p.device.type == "cpu" for p in made.parameters())
    assert {b.device.type for b in made.buffers()} == {"cpu"}
    close(made.rope.freqs_cos, network().rope.freqs_cos, 1e-6)


def test_shards_and_diffusers_names_load_as_well(tmp_path: Path) -> None:
    state = ours()
    parts = {"m-00001-of-00002.safetensors": sorted(state)[:10], "m-00002-of-00002.safetensors": sorted(state)[10:]}
    (tmp_path / "transformer").mkdir()
    for name, keys in parts.items():
        save_safetensors(tmp_path / "transformer" / name, {key: state[key] for key in keys})
    index = {key: name for name, keys in parts.items() for key in keys}
    (tmp_path / "transformer" / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    recipe = replace(MICRO, file="transformer/m.safetensors.index.json", sub_key=None)
    close(outputs(load_network(recipe, str(tmp_path), torch.float32, "cpu")), outputs(network()), 0)


def test_shards_are_fetched_with_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    (hub / "transformer").mkdir(parents=True)
    save_safetensors(tmp_path / "one.safetensors", ours())
    index = {"weight_map": {key: "one.safetensors" for key in ours()}}
    (hub / "transformer" / "m.safetensors.index.json").write_text(json.dumps(index))

    def download(repository: str, file: str) -> str:
        if file == "transformer/one.safetensors":
            (tmp_path / "one.safetensors").rename(hub / file)
        return str(hub / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    recipe = replace(MICRO, file="transformer/m.safetensors.index.json", sub_key=None)
    close(outputs(load_network(recipe, None, torch.float32, "cpu")), outputs(network()), 0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_time_and_modulation_stay_wide_in_a_narrow_network(device: str, tmp_path: Path) -> None:
    made = load_network(MICRO, folder_with(tmp_path), torch.bfloat16, device)
    wide = {name for name, p in made.named_parameters() if p.dtype == torch.float32}
    assert {p.dtype for p in made.parameters()} == {torch.float32, torch.bfloat16}
    assert {"condition_embedder.time_embedder.linear_1.weight", "condition_embedder.time_proj.weight",
            "scale_shift_table", "blocks.0.scale_shift_table", "blocks.1.norm2.bias"} <= wide  # fmt: skip
    assert not any("attn" in name or "ffn" in name or "text_embedder" in name for name in wide)
    assert all(stored(name, torch.float64) == torch.float64 for name in ours())
    if device == "meta":
        return
    with torch.no_grad():  # it computes, and is near the wide network
        answer = made(torch.zeros(1, 16, 1, 4, 4).bfloat16(), torch.tensor([937.5]), torch.ones(1, 5, 16).bfloat16())[0]
        exact = network()(torch.zeros(1, 16, 1, 4, 4), torch.tensor([937.5]), torch.ones(1, 5, 16))[0]
        assert float((answer - exact).abs().max() / exact.abs().max()) < 0.05


ADAPTER = ReleasedLoRA("owner/repo", "lora.pt", "generator_lora", RANK, ALPHA, embeddings=True)


@pytest.mark.parametrize(
    "content",
    [lambda: {"generator_lora": lora(outside=OUTSIDE), "critic_lora": {}}, lambda: lora(outside=OUTSIDE)],
    ids=["under its key", "bare"],
)
def test_a_released_adapter_is_merged_in_float32(content: Callable[[], dict], tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    save_torch(tmp_path / "lora.pt", content())
    state, adapter = originals(ours()), lora(outside=OUTSIDE)
    for key in [key for key in adapter if ".lora_A." in key]:
        name = f"{key.removeprefix('base_model.model.').split('.lora_A')[0]}.weight"
        state[name] = state[name] + ALPHA / RANK * adapter[key.replace("_A.", "_B.")] @ adapter[key]
    made = load_network(replace(MICRO, lora=(ADAPTER,)), folder, torch.float32, "cpu")
    q = "blocks.1.attn1.to_q.weight"
    close(made.get_parameter(q), state["blocks.1.self_attn.q.weight"], 1e-6)
    narrow = load_network(replace(MICRO, lora=(ADAPTER,)), folder, torch.bfloat16, "cpu")
    assert torch.equal(narrow.get_parameter(q), made.get_parameter(q).bfloat16()), "rounded once, after the sum"
    twice = load_network(replace(MICRO, lora=(ADAPTER, ADAPTER)), folder, torch.float32, "cpu").get_parameter(q)
    close(twice - made.get_parameter(q), made.get_parameter(q) - network().get_parameter(q), 1e-6)


def test_nothing_is_copied_before_everything_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path)
    monkeypatch.setattr(recipes, "converted", lambda *_, **__: pytest.fail("a tensor was copied"))
    wrong = lora(outside=OUTSIDE)
    del wrong["base_model.model.blocks.1.ffn.2.lora_B.weight"]
    save_torch(tmp_path / "lora.pt", wrong)
    with pytest.raises(ValueError, match=r"1 keys are missing: blocks\.1\.ffn\.2\.lora_B"):
        load_network(replace(MICRO, lora=(ADAPTER,)), folder, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"tensors are missing"):
        load_network(replace(MICRO, network={**micro_config(), "num_layers": 3}), folder, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"shapes differ"):
        load_network(replace(MICRO, network={**micro_config(), "ffn_dim": 48}), folder, torch.float32, "cpu")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_numbers_that_are_not_finite_are_refused_by_name(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """A damaged file, and a network that its dtype cannot hold."""
    load_network(MICRO, folder_with(tmp_path), dtype)
    state = dict(ours())
    state["blocks.1.ffn.net.2.weight"] = state["blocks.1.ffn.net.2.weight"].index_fill(0, torch.tensor([3]), value)
    folder = folder_with(tmp_path, generator_ema=originals(state))
    with pytest.raises(ValueError, match=r"^blocks\.1\.ffn\.net\.2\.weight of .* not finite in float") as said:
        load_network(MICRO, folder, dtype)
    assert "\n" not in str(said.value)


def test_an_adapter_in_place_of_a_network_is_told_apart(tmp_path: Path) -> None:
    save_torch(tmp_path / "a.pt", lora())
    with pytest.raises(ValueError, match=r"a\.pt holds adapters, not a network; name it in WanRecipe\.lora"):
        load_network(replace(MICRO, sub_key=None), str(tmp_path), torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"licence": ""}, "WanRecipe.licence must not be empty"),
        ({"block_frames": 0}, "WanRecipe.block_frames must be at least 1, got 0"),
    ],
)
def test_a_recipe_refuses_what_it_cannot_mean(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(MICRO, **change)
    with pytest.raises(ValueError, match=r"ReleasedLoRA\.rank and alpha must be positive"):
        ReleasedLoRA("a/b", "c.pt", rank=0)
    with pytest.raises(ValueError, match=r"WanRecipe\.network=\{'heads': 3\}: .*heads"):
        load_network(replace(MICRO, network={"heads": 3}), device="meta")
