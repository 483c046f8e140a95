"""What `armillary export` writes is read by diffusers and by armillary, and answers as the run's own adapter does."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import framework
from backbones.embedded.generator import packaged_generator
from backbones.wan.recipes import ReleasedLoRA, WanRecipe
from framework.adapters import ADAPTER, EXPORTED, WAN_LINEARS, FullFineTuning, LoRA, load_adaptation, save_for_diffusers
from framework.cli import main
from framework.commands.export import card_lines
from framework.config.load import load_config
from framework.schedules import FewStepSchedule
from tests.backbones.wan_files import network, outputs
from tests.support import close, holds, normal, refuted

EVERYWHERE = (*WAN_LINEARS, "linear_1", "linear_2", "time_proj", "proj_out")


def trained(lora: LoRA, seed: int = 0, made: nn.Module | None = None) -> nn.Module:
    """A network with an adapter that does something."""
    made = network() if made is None else made
    for i, parameter in enumerate(lora.attach(made, seed).values()):
        parameter.data += 0.1 * normal(1000 * seed + i, *parameter.shape).to(parameter)
    return made


def ask(made: nn.Module) -> Tensor:
    """The answer of an embedded network."""
    words = made.get_parameter("condition_embedder.text_embedder.linear_1.weight").shape[1]
    x, text = (normal(i, *shape, dtype=torch.float32) for i, shape in enumerate([(1, 3, 2, 16, 16), (1, 6, words)]))
    with torch.no_grad():
        return made(x, torch.tensor([937.5]), text)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What export reads of a finished run, without the training."""
    folder = tmp_path_factory.mktemp("runs") / "nft"
    folder.mkdir()
    config = load_config("train", gin_files=["embedded/nft.gin"], gin_params=["adapters.LoRA.alpha = 24.0"])
    (folder / "config.gin").write_text(config.operative_config())
    (folder / "command.txt").write_text("armillary train --gin_file a.gin\narmillary train --gin_file 'b|c.gin'\n")
    (folder / "summary.json").write_text(json.dumps({"steps": 50, "samples": 2400}))
    lora = LoRA(16, 24.0)
    lora.save(trained(lora, made=packaged_generator().network), folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    folder = run.parent / "exported"
    assert main(["export", "--run", str(run), "--output_dir", str(folder), "--merged"]) == 0
    return folder


# Equal answers


def check_loads_back(rank: int, alpha: float, everywhere: bool, folder: Path, save: Callable) -> None:
    """diffusers, diffusers without the metadata, and armillary itself all see the same adapter."""
    made = trained(LoRA(rank, alpha, EVERYWHERE if everywhere else WAN_LINEARS), seed=rank)
    save(made, folder / EXPORTED)
    answer = outputs(made)
    assert float((answer - outputs(network())).abs().max()) > 1e-2
    theirs, bare, again = network(), network(), network()
    theirs.load_lora_adapter(str(folder), weight_name=EXPORTED)
    bare.load_lora_adapter(load_file(folder / EXPORTED))
    load_adaptation(again, folder)
    for loaded in (theirs, bare, again):
        close(outputs(loaded), answer, 1e-4)


SETTINGS = (st.integers(1, 5), st.sampled_from((1.0, 2.5, 8.0)), st.booleans())


def test_an_exported_adapter_answers_alike_everywhere(tmp_path: Path) -> None:
    holds(lambda *drawn: check_loads_back(*drawn, tmp_path, save_for_diffusers), *SETTINGS, examples=6)

    def without_scale(made: nn.Module, path: Path) -> None:
        """alpha forgotten, as a file in PEFT's layout forgets it."""
        for module in made.modules():
            if ADAPTER in getattr(module, "scaling", {}):
                module.scaling[ADAPTER] = 1.0
        save_for_diffusers(made, path)
        for module in made.modules():
            if ADAPTER in getattr(module, "scaling", {}):
                module.scaling[ADAPTER] = 3.0

    refuted(lambda *drawn: check_loads_back(*drawn, tmp_path, without_scale), *SETTINGS, examples=3)


def test_a_run_of_the_embedded_generator_is_exported_as_it_is(run: Path, exported: Path) -> None:
    own, theirs, again = (packaged_generator().network for _ in range(3))
    load_adaptation(own, run / "adapter")
    theirs.load_lora_adapter(str(exported), weight_name=EXPORTED)
    load_adaptation(again, exported)
    close(ask(theirs), ask(own), 1e-5)
    close(ask(again), ask(own), 1e-5)
    assert float((ask(own) - ask(packaged_generator().network)).abs().max()) > 1e-2
    assert all(re.fullmatch(r"transformer\..+\.lora_[AB]\.weight", key) for key in load_file(exported / EXPORTED))


def test_the_merged_transformer_is_a_stock_one(run: Path, exported: Path) -> None:
    own = packaged_generator().network
    load_adaptation(own, run / "adapter")
    stock = WanTransformer3DModel.from_pretrained(exported / "transformer")
    assert set(stock.state_dict()) == set(packaged_generator().network.state_dict())
    close(ask(stock), ask(own), 1e-4)


def test_a_stock_pipeline_loads_the_adapter(run: Path, exported: Path) -> None:
    own = packaged_generator().network
    stock = WanTransformer3DModel(**{k: v for k, v in own.config.items() if not k.startswith("_")})
    stock.load_state_dict(own.state_dict())
    load_adaptation(own, run / "adapter")
    pipeline = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), stock)  # pyright: ignore
    pipeline.load_lora_weights(str(exported))
    close(ask(pipeline.transformer), ask(own), 1e-4)


# The folder


def test_the_card_says_where_it_comes_from_and_under_which_terms(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    for wanted in (
        "packaged with armillary", "Apache-2.0", "embedded-shapes", "0.8333", "shapes.ShapesReward(", "nft.NFT(",
        "50 steps, 2400 clips", r"--gin_file 'b\|c.gin'", framework.__version__, "load_lora_adapter", "rank 16",
        "WanTransformer3DModel.from_pretrained",
    ):  # fmt: skip
        assert wanted in card, wanted
    assert "factory" not in card and card.startswith("---\n")
    assert (exported / "training_config.gin").read_bytes() == (run / "config.gin").read_bytes()
    assert {path.name for path in exported.iterdir()} == {"README.md", EXPORTED, "training_config.gin", "transformer"}


def test_the_card_of_a_released_checkpoint_names_its_files_and_its_licence(run: Path) -> None:
    lora = ReleasedLoRA("owner/repo", "lora.pt", "generator_lora")
    recipe = WanRecipe("longlike", "owner/repo", "base.pt", "CC-BY-NC-4.0: NON-COMMERCIAL", "generator", lora=(lora,))
    card = "\n".join(card_lines(run, recipe.generator_recipe()))
    assert "| base | owner/repo: base.pt [generator] + owner/repo: lora.pt |" in card
    assert "| licence of the base | CC-BY-NC-4.0: NON-COMMERCIAL |" in card
    framewise = replace(recipe, block_frames=1, schedule=FewStepSchedule((1000,)), first_schedule=FewStepSchedule())
    card = "\n".join(card_lines(run, framewise.generator_recipe()))
    assert "σ 1.0000 (the first one: 1.0000, 0.9375, 0.8333, 0.6250), 16 fps" in card


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr."""
    capsys.readouterr()
    assert main(["export", *arguments]) != 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("armillary: error: ")
    return err


def test_nothing_is_overwritten(run: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert "holds another run already" in refusal(capsys, "--run", str(run), "--output_dir", str(exported))
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before


def test_what_is_no_finished_run_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "export needs --run" in refusal(capsys)
    assert "is no finished run of `armillary train`: it holds no config.gin" in refusal(capsys, "--run", str(tmp_path))
    (tmp_path / "config.gin").write_bytes((run / "config.gin").read_bytes())
    assert "it holds no adapter" in refusal(capsys, "--run", str(tmp_path))
    FullFineTuning().save(packaged_generator().network, tmp_path / "adapter")
    assert "give --merged" in refusal(capsys, "--run", str(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_whole_weights_are_exported_as_a_transformer(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.gin").write_bytes((run / "config.gin").read_bytes())
    made = packaged_generator().network
    made.get_parameter("proj_out.bias").data += 1
    FullFineTuning().save(made, tmp_path / "adapter")
    assert main(["export", "--run", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--merged"]) == 0
    close(ask(WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")), ask(made), 1e-4)
    assert not (tmp_path / "out" / EXPORTED).exists()
    assert "the run is not finished" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["metadata", "missing", "shape"])
def test_a_damaged_export_is_refused_whole(damage: str, exported: Path, tmp_path: Path) -> None:
    weights = load_file(exported / EXPORTED)
    facts = {"transformer.r": 16, "transformer.lora_alpha": 16, "transformer.target_modules": list(WAN_LINEARS)}
    key = sorted(weights)[0]
    if damage == "missing":
        del weights[key]
    elif damage == "shape":
        weights[key] = weights[key].T.contiguous()
    metadata = {} if damage == "metadata" else {"lora_adapter_metadata": json.dumps(facts)}
    save_file(weights, tmp_path / EXPORTED, metadata)
    made = packaged_generator().network
    before = ask(made)
    with pytest.raises(ValueError, match=EXPORTED):
        load_adaptation(made, tmp_path)
    close(ask(made), before, 1e-6)
