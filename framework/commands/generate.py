"""The root that generates videos: streaming, block by block, so that memory does not grow with the length."""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from framework.arguments import check_counts
from framework.commands.adaptation import put_on
from framework.commands.interactive import HELP, Lines, PromptLog, converse, say_why
from framework.data.given_frames import given_latents, read_frames
from framework.data.scene_files import script_of_line
from framework.data.scenes import PromptFile
from framework.data.script import Script
from framework.devices import prepare
from framework.film import Direction, film, scripted
from framework.interfaces import GeneratorRecipe, StreamingGenerator
from framework.kernels import Consistency, TransitionKernel
from framework.reporting.progress import progress, say
from framework.reporting.reel import Reel
from framework.reporting.runfolder import create_run_folder, fresh_folder, removed_if_empty
from framework.rng import check_seed, derive_seed, draw_noise
from framework.rollout import noise_shape


def generate(
    *,
    generator: StreamingGenerator,
    output_dir: str | None = None,
    prompts: Sequence[str] = (),
    prompt_file: str | None = None,
    switch_frames: Sequence[int] = (),
    image: str | None = None,
    interactive: bool = False,
    blocks: int | None = None,
    kernel: TransitionKernel | None = None,
    adapter: str | None = None,
    clips_per_batch: int = 8,
    scale: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
) -> list[Path]:
    """Write one mp4 per prompt; returns their paths.

    output_dir: a new folder, None for a fresh one under runs/. prompts, prompt_file: what to show; at least one of
    them. A prompt may be several that follow each other, ``a [3s] | b | # c``, where # starts a new shot that remembers
    nothing; without lengths they switch at switch_frames (latent frames), or share the video equally. image: a picture
    or mp4 that the videos go on from, in whole blocks, which count among ``blocks``. interactive: prompts come from
    standard input while the stream is generated. blocks: length in blocks, None for the recipe's clip length, or
    without end if interactive. adapter: a training run or its adapter, or exported LoRA weights.
    clips_per_batch: streams generated side by side. scale: whole factor of enlargement in the mp4, None for one that
    shows small frames. A block is decoded and written before the next one starts.
    """
    check_seed(seed, "generate.seed")
    check_counts("generate.", blocks=blocks, clips_per_batch=clips_per_batch, scale=scale)
    recipe, kernel = generator.recipe, kernel or Consistency()
    length = recipe.clip_blocks if blocks is None else blocks
    scripts = wanted_scripts(prompts, prompt_file, switch_frames, recipe, length)
    if interactive:
        check_interactive(scripts)
    elif not scripts:
        raise ValueError("nothing to generate: give --prompt or --prompt_file")
    prepare(generator.network, device, threads)
    given = None
    if image is not None:
        given = first_latents(generator, image, device)
        check_given(given.shape[2], recipe, blocks if interactive else length, scripts)
    put_on(generator, adapter)
    folder = create_run_folder(fresh_folder("generate") if output_dir is None else output_dir)
    reel, noise = Reel(recipe.fps, scale), BlockNoise(seed, noise_shape(generator, kernel, 1), device)
    with removed_if_empty(folder):
        if interactive:
            first = scripts[0].cues[0].prompt if scripts else None
            stream_interactively(generator, kernel, noise, reel, folder, first, blocks, given)
        else:
            film_scripts(generator, kernel, noise, reel, folder, scripts, length, clips_per_batch, given)
    for line in reel.report():
        say(line)
    return reel.paths


@dataclass(frozen=True)
class BlockNoise:
    """The noise of a block: it depends on the seed, the video's number and prompts, and the block alone.

    shape: of one clip's, see `noise_shape`.
    """

    seed: int
    shape: tuple[int, ...]
    device: str

    def __call__(self, clips: Sequence[tuple[int, str]], block: int) -> Tensor:
        """[N, *shape] of N clips, each (its number, its prompts)."""
        seeds = [derive_seed(self.seed, "generate", number, text, block) for number, text in clips]
        return draw_noise(seeds, self.shape, self.device)


def film_scripts(
    generator: StreamingGenerator,
    kernel: TransitionKernel,
    noise: BlockNoise,
    reel: Reel,
    folder: Path,
    scripts: Sequence[Script],
    length: int,
    clips_per_batch: int,
    given: Tensor | None,
) -> None:
    """Generate a video of ``length`` blocks per script, ``clips_per_batch`` side by side."""
    numbered = [(i, " | ".join(cue.prompt for cue in script.cues)) for i, script in enumerate(scripts)]
    for batch in batches(scripts, clips_per_batch):
        shown = [scripts[i] for i in batch]
        takes = film(
            generator, scripted(shown, generator.recipe.block_frames, length),
            partial(noise, [numbered[i] for i in batch]), kernel, given=given,
            switches=any(len(script.cues) - len(script.cuts) > 1 for script in shown),
        )  # fmt: skip
        with progress(length, "generating") as bar:
            paths = [folder / f"{i:03d}-{slug(text)}.mp4" for i, text in (numbered[i] for i in batch)]
            reel.write(takes, paths, lambda _, bar=bar: bar.update())
    reel.paths.sort()


def stream_interactively(
    generator: StreamingGenerator,
    kernel: TransitionKernel,
    noise: BlockNoise,
    reel: Reel,
    folder: Path,
    first: str | None,
    blocks: int | None,
    given: Tensor | None,
) -> None:
    """Generate one stream that standard input tells what to show, into ``stream.mp4`` and ``prompts.jsonl``."""
    say(HELP)
    said: list[str] = []

    def directions() -> Iterator[Direction]:
        for direction in converse(Lines(sys.stdin), first, blocks):
            said.extend(prompt for prompt in direction.prompts if prompt is not None)
            yield direction

    takes = film(
        generator, directions(), lambda block: noise([(0, said[0])], block), kernel, given=given, refused=say_why
    )
    reel.write(takes, [folder / "stream.mp4"], PromptLog(folder / "prompts.jsonl").note, endless=True)


def wanted_scripts(
    prompts: Sequence[str], prompt_file: str | None, switch_frames: Sequence[int], recipe: GeneratorRecipe, blocks: int
) -> list[Script]:
    """What to show, on blocks. Raises ValueError for a prompt that the video is too short to show."""
    frames = blocks * recipe.block_frames
    scripts = [script_of_line(prompt, "--prompt", recipe.latent_fps, frames, switch_frames) for prompt in prompts]
    if prompt_file is not None:
        scripts += PromptFile(prompt_file, recipe.latent_fps, frames, switch_frames).scripts()
    aligned = [script.on_blocks(recipe.block_frames) for script in scripts]
    for script in aligned:
        last = script.cues[-1]
        if last.start >= frames:
            raise ValueError(
                f"{last.prompt!r} would start at latent frame {last.start}, where a video of {blocks} blocks ends: "
                f"give --blocks {last.start // recipe.block_frames + 1} or more, or shorten what is before it"
            )
    return aligned


def check_interactive(scripts: Sequence[Script]) -> None:
    """Raises ValueError for more than one first prompt: the others come from standard input."""
    if len(scripts) > 1 or any(len(script.cues) > 1 for script in scripts):
        raise ValueError("--interactive takes at most one --prompt, the first; the others come from standard input")


def batches(scripts: Sequence[Script], size: int) -> list[list[int]]:
    """Numbers of scripts that are generated side by side: they cut at the same frames, because a cut clears the past
    of a whole batch."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, script in enumerate(scripts):
        alike.setdefault(script.cuts, []).append(i)
    return [group[first : first + size] for group in alike.values() for first in range(0, len(group), size)]


def first_latents(generator: StreamingGenerator, image: str, device: str) -> Tensor:
    """Clean latents [1, C, F, H, W] of the frames that the videos go on from."""
    frames, fps = read_frames(image)
    latents = given_latents(generator, frames, image, device)
    if fps is not None and abs(fps - generator.recipe.fps) > 0.5:
        say(f"{image} has {fps:g} frames per second, the video {generator.recipe.fps:g}: what moves changes its speed")
    return latents


def check_given(given: int, recipe: GeneratorRecipe, blocks: int | None, scripts: Sequence[Script]) -> None:
    """Raises ValueError where the given latent frames leave nothing to generate, or a cut falls into them."""
    if blocks is not None and given >= blocks * recipe.block_frames:
        raise ValueError(
            f"--image fills {given // recipe.block_frames} blocks, which count, and the video has {blocks}; raise "
            f"--blocks"
        )
    if any(cut < given for script in scripts for cut in script.cuts):
        raise ValueError(f"a cut falls into the {given} latent frames of --image; let it come after them")


def slug(prompt: str) -> str:
    """A file name from a prompt: letters and digits only, so that no prompt can leave the output folder."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "video"
