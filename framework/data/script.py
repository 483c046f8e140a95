"""What a video is asked to show and when: prompts, switches that keep the past, and cuts that forget it."""

import itertools
from dataclasses import dataclass, replace

from framework.types import Scene, Segment


@dataclass(frozen=True)
class Cue:
    """From latent frame ``start`` on this prompt. cut: in a new shot, which remembers nothing of what was before."""

    prompt: str
    start: int = 0
    cut: bool = False


@dataclass(frozen=True)
class Script:
    """The cues of one video in order. ``key`` names it.

    Raises ValueError unless the cues start at frame 0 and each one after the one before it, and for a cut at the
    first, before which there is nothing to forget.
    """

    key: str
    cues: tuple[Cue, ...]

    def __post_init__(self) -> None:
        starts = [cue.start for cue in self.cues]
        if not starts or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
            raise ValueError(f"segments must start at frame 0 and then each after the one before it, got {starts}")
        if self.cues[0].cut:
            raise ValueError("the first segment cannot be a cut: nothing is before it")

    @property
    def cuts(self) -> tuple[int, ...]:
        """The latent frames at which a new shot starts, the first one at 0 left out."""
        return tuple(cue.start for cue in self.cues if cue.cut)

    def scene(self) -> Scene:
        """The script as a scene to train on or to judge. Raises ValueError where it has a cut."""
        for cue in self.cues:
            if cue.cut:
                raise ValueError(
                    f"'#' asks for a cut, which forgets the past; only `armillary generate` makes one, and only "
                    f"switches that keep it are supported here; remove '#' from {'# ' + cue.prompt!r}"
                )
        return Scene(self.key, tuple(Segment(cue.prompt, cue.start) for cue in self.cues))

    def on_blocks(self, block_frames: int) -> "Script":
        """Every cue at the block that it takes effect with: the first that starts at its frame or later.

        Where several would start at one block, the last of them does; it is a cut if any of them was.
        """
        aligned: dict[int, Cue] = {}
        for cue in self.cues:
            start = -(-cue.start // block_frames) * block_frames
            before = aligned.get(start)
            aligned[start] = replace(
                cue, start=start, cut=start > 0 and (cue.cut or (before is not None and before.cut))
            )
        return replace(self, cues=tuple(aligned[start] for start in sorted(aligned)))

    def at(self, frame: int) -> Cue | None:
        """The cue that starts at a frame, None where none does."""
        return next((cue for cue in self.cues if cue.start == frame), None)
