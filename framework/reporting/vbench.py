"""Videos under the names that VBench's evaluator reads: ``{prompt}-{index}.mp4``, all in one folder.

VBench (2311.17982; `prompts/README.md` of its repository) takes a prompt from the name of its video and asks for five
videos of each. A prompt with a path separator, or one longer than a file system takes, cannot be a name as it stands:
`prompts.json` keeps the whole prompt of every video.
"""

import json
from pathlib import Path

from torch import Tensor

from framework.reporting.videos import write_mp4

LONGEST = 180
"""Bytes of a prompt in a name; file systems take 255 with the index and the ending."""
PROMPTS = "prompts.json"


def vbench_stem(prompt: str) -> str:
    """A prompt as the first part of a name that stays inside its folder and has at most `LONGEST` bytes.

    Path separators and control characters become "_"; any other prompt of usual length is unchanged.
    """
    safe = "".join("_" if c in "/\\" or ord(c) < 32 or ord(c) == 127 else c for c in prompt)
    return safe.encode()[:LONGEST].decode(errors="ignore").lstrip(".") or "_"


class VBenchFolder:
    """A new folder of videos; several of one prompt are counted from 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def add(self, prompt: str, frames: Tensor, fps: float) -> Path:
        """Write uint8 frames [T, 3, H, W] at their own size. Prompts of one name share its count."""
        stem = vbench_stem(prompt)
        index = self._counts.get(stem, 0)
        self._counts[stem] = index + 1
        path = self.folder / f"{stem}-{index}.mp4"
        write_mp4(path, frames, fps)
        self._written[path.name] = prompt
        return path

    def close(self) -> Path:
        """Write which prompt each video shows; returns that file's path."""
        path = self.folder / PROMPTS
        path.write_text(json.dumps(self._written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path
