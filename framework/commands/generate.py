"""The root that generates videos: streaming, block by block, so that memory does not grow with the length."""

import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from framework.adapters import load_adaptation
from framework.data.scene_files import scene_of_line
from framework.data.scenes import PromptFile
from framework.devices import prepare
from framework.interfaces import GeneratorRecipe, StreamingGenerator
from framework.kernels import Consistency, TransitionKernel
from framework.reporting.progress import progress, say
from framework.reporting.runfolder import create_run_folder, fresh_folder
from framework.reporting.videos import Mp4Writer, visible_scale
from framework.rng import check_seed, derive_seed, draw_noise
from framework.rollout import denoise_block, noise_shape
from framework.types import Scene, VideoBatch


@torch.no_grad()
def generate(
    *,
    generator: StreamingGenerator,
    output_dir: str | None = None,
    prompts: Sequence[str] = (),
    prompt_file: str | None = None,
    blocks: int | None = None,
    kernel: TransitionKernel | None = None,
    adapter: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
) -> list[Path]:
    """Write one mp4 per prompt; returns their paths.

    output_dir: a new folder, None for a fresh one under runs/. prompts, prompt_file: what to show; at least one of
    them. A prompt may be several that follow each other, ``a [3s] | b``; without lengths they share the video equally.
    blocks: length in blocks, None for the recipe's clip length. adapter: a folder that a training
    run saved. A block is decoded and written before the next one starts.
    """
    check_seed(seed, "generate.seed")
    if blocks is not None and blocks < 1:
        raise ValueError(f"generate.blocks must be at least 1, got {blocks}")
    blocks = generator.recipe.clip_blocks if blocks is None else blocks
    scenes = wanted_scenes(prompts, prompt_file, generator.recipe, blocks)
    wanted = [" | ".join(segment.prompt for segment in scene.segments) for scene in scenes]
    if not wanted:
        raise ValueError("nothing to generate: give --prompt or --prompt_file")
    prepare(generator.network, device, threads)
    folder = create_run_folder(fresh_folder("generate") if output_dir is None else output_dir)
    if adapter is not None:
        say(f"adapter: {load_adaptation(generator.network, adapter)}")
    recipe, kernel = generator.recipe, kernel or Consistency()
    shape = noise_shape(generator, kernel, 1)
    paths = [folder / f"{i:03d}-{slug(prompt)}.mp4" for i, prompt in enumerate(wanted)]

    switches = any(len(scene.segments) > 1 for scene in scenes)
    stream = generator.open([scene.prompt for scene in scenes], switches=switches)
    started, frames = time.perf_counter(), 0
    with ExitStack() as stack:
        writers: list[Mp4Writer] = []
        for block in progress(range(blocks), "generating"):
            stream = generator.follow(stream, scenes)
            seeds = [derive_seed(seed, "generate", i, prompt, block) for i, prompt in enumerate(wanted)]
            x0 = denoise_block(generator, stream, draw_noise(seeds, shape, device), kernel).x0
            stream = generator.commit(x0, stream)
            videos = VideoBatch.from_signed(generator.decode(x0), recipe.fps, wanted)
            if not writers:
                scale = visible_scale(videos.frames.shape[-2])
                writers = [stack.enter_context(Mp4Writer(path, recipe.fps, scale=scale)) for path in paths]
            for writer, clip in zip(writers, videos.frames, strict=True):
                writer.write(clip)
            frames += videos.frames.shape[0] * videos.frames.shape[1]
    seconds = time.perf_counter() - started
    say(f"{frames} frames in {seconds:.1f} s, {frames / seconds:.1f} frames per second ({len(wanted)} streams)")
    for path in paths:
        say(f"saved {path}")
    return paths


def wanted_scenes(prompts: Sequence[str], prompt_file: str | None, recipe: GeneratorRecipe, blocks: int) -> list[Scene]:
    """What to show, cut on blocks."""
    frames = blocks * recipe.block_frames
    scenes = [scene_of_line(prompt, "--prompt", recipe.latent_fps, frames) for prompt in prompts]
    if prompt_file is not None:
        scenes += PromptFile(prompt_file, recipe.latent_fps, frames).scenes()
    return [scene.on_blocks(recipe.block_frames) for scene in scenes]


def slug(prompt: str) -> str:
    """A file name from a prompt: letters and digits only, so that no prompt can leave the output folder."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "video"
