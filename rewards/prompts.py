"""The scorers' prompt templates, which are inputs of the networks and other projects' texts.

They are not part of this package. A template is read from a file, out of the sources of a cloned repository, or out of
those of an installed distribution, which are parsed and never run; it is accepted iff its sha256 is the pinned one.
Blanks at the ends of lines belong to it: without them other tokens are scored, as one released trainer does.
"""

import ast
import hashlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

PLACEHOLDER = "{text_prompt}"
SPECIAL = re.compile(r"<\|[^<>|\s]+\|>")
"""How the tokenizer's special tokens are spelled."""


@dataclass(frozen=True)
class Template:
    """A pinned template. name: of the scorer. vision: the token that patches stand for. rewards: its reward tokens.
    sha256, size: of its bytes. project: where it comes from. stripped: sha256 without the blanks at line ends."""

    name: str
    vision: str
    rewards: tuple[str, ...]
    sha256: str
    size: int
    stripped: str
    project: str

    def check(self, text: bytes, source: str) -> str:
        """The text, if it is the pinned one. Raises ValueError that says what it is instead, and where to get it."""
        found = hashlib.sha256(text).hexdigest()
        if found == self.sha256:
            return text.decode("ascii")
        reason = f"has {len(text)} bytes with sha256 {found[:16]}…, not {self.size} with {self.sha256[:16]}…"
        if found.startswith(self.stripped):
            reason = "lacks the blanks at the ends of its lines, which are part of the prompt; a tool removed them"
        raise ValueError(f"the {self.name} template {source} {reason}; {self.origin}")

    @property
    def origin(self) -> str:
        """Where the template can be had, for messages."""
        return f"it comes unchanged from {self.project} (trailing blanks matter); name a file or folder with template="


VIDEOALIGN = Template(
    name="VideoAlign",
    vision="<|video_pad|>",
    rewards=("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"),
    sha256="fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700",
    size=3997,
    stripped="2efb373e0f6b386f",
    project="prompt_template.py of github.com/KlingTeam/VideoAlign (MIT)",
)
HPSV3 = Template(
    name="HPSv3",
    vision="<|image_pad|>",
    rewards=("<|Reward|>",),
    sha256="f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c",
    size=2590,
    stripped="117f7fe566007a74",
    project="github.com/MizzenAI/HPSv3 or its wheel hpsv3 (MIT)",
)


def read_template(template: Template, source: str) -> str:
    """The template's text from ``source``: a text file, a Python source or a folder of them, or ``package:NAME`` for an
    installed distribution. Raises ValueError that says what was there and where the template comes from."""
    if source.startswith("package:"):
        return _from_sources(template, _distribution_sources(template, source.removeprefix("package:")), source)
    path = Path(source)
    if path.is_dir():
        named = path / f"{template.name.lower()}_prompt.txt"
        if named.is_file():
            return read_template(template, str(named))
        return _from_sources(template, sorted(path.rglob("*.py")), source)
    if not path.is_file():
        raise ValueError(f"there is no {template.name} template {source}; {template.origin}")
    if path.suffix == ".py":
        return _from_sources(template, [path], source)
    return template.check(path.read_bytes(), source)


def _distribution_sources(template: Template, name: str) -> list[Path]:
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"the distribution {name!r} is not installed, so the {template.name} template cannot be read from it; "
            f"{template.origin}"
        ) from error
    return [Path(str(file.locate())) for file in files if file.suffix == ".py"]


def _from_sources(template: Template, files: Iterable[Path], source: str) -> str:
    """The one of the texts in Python sources that has the pinned hash."""
    near: bytes | None = None
    for file in files:
        for text in _candidates(file, template):
            if hashlib.sha256(text).hexdigest() == template.sha256:
                return template.check(text, str(file))
            near = near or text
    if near is not None:
        return template.check(near, f"in {source}")
    raise ValueError(
        f"{source} has no Python source with a text that ends like the {template.name} template; {template.origin}"
    )


def _candidates(file: Path, template: Template) -> Iterator[bytes]:
    """Texts of a source that have the placeholder and all reward tokens, and pairs that have them when put together:
    one project keeps the question and its end apart. Parsed only: nothing in the file is run."""
    try:
        content = file.read_text(encoding="utf-8")
        if template.rewards[0] not in content:
            return
        tree = ast.parse(content)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return  # not a source that could hold it; what was searched for is named by the caller
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    asking = [text for text in texts if PLACEHOLDER in text]
    ending = ["", *(text for text in texts if template.rewards[-1] in text and PLACEHOLDER not in text)]
    for text in map("".join, product(asking, ending)):
        if all(token in text for token in template.rewards):
            yield text.encode()


def fill(text: str, prompt: str) -> str:
    """The template with a user's prompt, inserted literally: braces stay as they are.

    Raises ValueError for a prompt that spells a special token: it would be read as one.
    """
    special = SPECIAL.search(prompt)
    if special is not None:
        raise ValueError(f"the prompt {prompt[:60]!r} contains the special token {special[0]!r}, which it must not")
    return text.replace(PLACEHOLDER, prompt)


def render(template: Template, text: str, prompt: str) -> str:
    """The conversation as the tokenizer reads it, with one vision token: system turn, user turn, assistant header."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{template.vision}<|vision_end|>{fill(text, prompt)}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
