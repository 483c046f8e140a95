"""The root that hands a trained run on: its adapter in diffusers' naming, whole weights if asked, and a model card."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from diffusers.models.modeling_utils import ModelMixin

import framework
from framework.adapters import EXPORTED, load_adaptation, lora_layers, merge_adapters, save_for_diffusers
from framework.config.bindings import write_value
from framework.config.described import described
from framework.config.load import Configuration, load_config
from framework.interfaces import GeneratorRecipe, StreamingGenerator
from framework.reporting.progress import say
from framework.reporting.runfolder import create_run_folder, fresh_folder
from framework.schedules import FewStepSchedule

CONFIG, CARD, TRANSFORMER = "config.gin", "README.md", "transformer"


def export(
    *,
    generator: StreamingGenerator,
    run: str,
    output_dir: str | None = None,
    merged: bool = False,
) -> Path:
    """Write ``pytorch_lora_weights.safetensors``, a model card and the run's configuration; returns the folder.

    run: folder of a finished run of `armillary train`. output_dir: a new folder, None for a fresh one under runs/; what
    holds anything is refused. merged: also write the whole transformer, adapter and released adapters in its weights,
    as diffusers saves models. Raises ValueError in one line for a run that left no adapter.
    """
    trained = run_folder(run) / "adapter"
    say(f"adapter: {load_adaptation(generator.network, trained)}")
    has_lora = bool(lora_layers(generator.network))
    if not has_lora and not merged:
        raise ValueError(f"{run} trained all weights, so there is no adapter to export; give --merged for the weights")
    if merged and not isinstance(generator.network, ModelMixin):
        raise ValueError(f"--merged needs a network that diffusers can save, not a {type(generator.network).__name__}")
    folder = create_run_folder(fresh_folder("export") if output_dir is None else output_dir)
    lines = card_lines(Path(run), generator.recipe)
    if has_lora:
        rank = save_for_diffusers(generator.network, folder / EXPORTED)
        lines += ["", f"## The adapter, rank {rank}", "", *LORA_USE]
        say(f"saved {folder / EXPORTED}")
    if merged:
        merge_adapters(generator.network)
        assert isinstance(generator.network, ModelMixin)
        generator.network.save_pretrained(folder / TRANSFORMER)
        lines += ["", "## The whole transformer", "", *MERGED_USE]
        say(f"saved {folder / TRANSFORMER}")
    shutil.copyfile(Path(run) / CONFIG, folder / "training_config.gin")
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"saved {folder / CARD}")
    return folder


def run_folder(run: str) -> Path:
    """The folder of a run that has an adapter to give. Raises ValueError for anything else."""
    folder = Path(run)
    for name, kind in ((CONFIG, "configuration"), ("adapter", "trained weights")):
        if not (folder / name).exists():
            raise ValueError(f"run={run!r} is no finished run of `armillary train`: it holds no {name} ({kind})")
    return folder


def training_configuration(folder: Path) -> Configuration:
    """The configuration that a run was trained with. Raises ConfigError where it cannot be read here."""
    return load_config("train", gin_files=[str((folder / CONFIG).resolve())])


def generator_of_run(run: str) -> tuple[list[str], list[str]]:
    """(gin files, gin lines) that give `export` the generator that a run was trained with."""
    folder = run_folder(run)
    table = training_configuration(folder).bindings.table
    (bound,) = (binding.value for key, binding in table.items() if str(key) == "train.generator")
    return [str((folder / CONFIG).resolve())], [f"export.generator = {write_value(bound)}"]


LORA_USE = (
    f"`{EXPORTED}` has diffusers' names and the scale in its weights (alpha = rank). It belongs on the weights above,",
    "released adapters merged in; on others it is another model.",
    "",
    "```python",
    f'transformer.load_lora_adapter(folder, weight_name="{EXPORTED}")    # or pipeline.load_lora_weights(folder)',
    "```",
    "",
    "With armillary: `--adapter FOLDER` of `generate` and `evaluate`. A stock pipeline is bidirectional.",
)
MERGED_USE = (
    f"`{TRANSFORMER}/` holds all weights in diffusers' names: `WanTransformer3DModel.from_pretrained(folder,",
    f'subfolder="{TRANSFORMER}")`.',
)


def card_lines(folder: Path, recipe: GeneratorRecipe) -> list[str]:
    """The model card: what it is trained from, under which terms, how, and on which rewards."""
    configuration = training_configuration(folder)
    digest = hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()
    first = f" (the first one: {levels(recipe.first_schedule)})" if recipe.first_schedule is not None else ""
    facts = {
        "base": recipe.source or "not recorded",
        "licence of the base": recipe.licence or "not recorded",
        "recipe": f"{recipe.name}: blocks of {recipe.block_frames} latent frames, σ {levels(recipe.schedule)}{first}, "
        f"{recipe.fps:g} fps",
        "generator": built(configuration, "generator"),
        "method": f"{built(configuration, 'exploration')}, {built(configuration, 'surrogate')}",
        "rewards": built(configuration, "reward"),
        "training command": last_line(folder / "command.txt"),
        "configuration": f"training_config.gin, sha256 {digest}",
        "steps": steps_of(folder),
        "armillary": framework.__version__,
    }
    rows = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in facts.items()]
    return [
        "---", "library_name: diffusers", "license: other", "tags: [text-to-video, streaming, lora, armillary]", "---",
        "", f"# {recipe.name}, aligned with armillary", "",
        "The weights are a derivative of their base: its licence binds whoever uses or passes them on.", "",
        "| | |", "|---|---|", *rows,
    ]  # fmt: skip


def levels(schedule: FewStepSchedule) -> str:
    """The noise levels of a sampler."""
    return ", ".join(f"{sigma:.4f}" for sigma in schedule.sigmas)


def built(configuration: Configuration, parameter: str) -> str:
    """What a parameter becomes, without the defaults that are made anew for every object."""
    text = described(configuration, parameter)
    return re.sub(r"(?<=\()\w+=<factory>(, )?|, \w+=<factory>", "", text)


def last_line(path: Path) -> str:
    """The last line of a file, or that there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return f"`{lines[-1]}`" if lines else "not recorded"


def steps_of(folder: Path) -> str:
    """How long a run trained, by its summary."""
    summary = folder / "summary.json"
    if not summary.is_file():
        return "the run is not finished"
    numbers = json.loads(summary.read_text(encoding="utf-8"))
    return f"{numbers['steps']} steps, {numbers['samples']} clips"
