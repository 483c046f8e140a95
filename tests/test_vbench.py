"""Videos for VBench carry their prompt in their name, stay in their folder, and never replace each other."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hypothesis import strategies as st

from framework.reporting.vbench import PROMPTS, VBenchFolder, vbench_stem
from tests.support import holds, refuted

CLIP = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
PLAIN = st.text("abc é|#,.'-?", min_size=1, max_size=40).filter(lambda text: not text.startswith("."))


def check_inside(stem: Callable[[str], str], prompt: str) -> None:
    name = f"{stem(prompt)}-0.mp4"
    assert (Path("/folder") / name).resolve().parent == Path("/folder")
    assert "\0" not in name and "\n" not in name and len(name.encode()) <= 255


def test_no_prompt_leaves_its_folder_or_is_too_long_for_a_name():
    texts = st.text(max_size=300) | st.sampled_from(["../../x", "/etc/x", "a/b", "..", "", "é" * 300, "a\\b"])
    holds(partial(check_inside, vbench_stem), texts)
    refuted(partial(check_inside, lambda prompt: prompt), st.sampled_from(["../../x", "a/b"]))


def test_a_usual_prompt_is_its_name():
    def check(prompt: str) -> None:
        assert vbench_stem(prompt) == prompt

    holds(check, PLAIN)


def test_several_videos_of_a_prompt_are_counted_and_all_are_listed(tmp_path: Path):
    folder = VBenchFolder(tmp_path / "vbench")
    prompts = ["a dog", "a dog", "either/or", "either_or", "x" * 300]
    paths = [folder.add(prompt, CLIP, 8.0) for prompt in prompts]
    assert [path.name for path in paths[:4]] == ["a dog-0.mp4", "a dog-1.mp4", "either_or-0.mp4", "either_or-1.mp4"]
    assert len(set(paths)) == 5 and all(path.parent == tmp_path / "vbench" for path in paths)
    listed = json.loads(folder.close().read_text(encoding="utf-8"))
    assert listed == {path.name: prompt for path, prompt in zip(paths, prompts, strict=True)}
    assert sorted(p.name for p in (tmp_path / "vbench").iterdir()) == sorted([*listed, PROMPTS])
