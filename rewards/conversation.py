"""From a user's prompt and a grid of patches to the row of tokens that a scorer reads."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.preprocess import token_count
from rewards.prompts import Template, render
from rewards.qwen2vl import RewardTokens


@dataclass(frozen=True)
class Conversation:
    """A verified template with the tokenizer that turns it into ids.

    text: of the template, as `rewards.prompts.read_template` gives it. tokenizer: of transformers; its special tokens
    must have the ids of ``tokens``, which the network was trained with. Raises ValueError for another text than the
    pinned one, and for other ids.
    """

    template: Template
    text: str
    tokenizer: Any
    tokens: RewardTokens

    def __post_init__(self) -> None:
        self.template.check(self.text.encode(), "that was given")
        wanted = dict(zip(self.template.rewards, self.tokens.rewards, strict=True))
        wanted[self.template.vision] = self.tokens.vision
        for spelled, token in wanted.items():
            ids = self.tokenizer(spelled, add_special_tokens=False)["input_ids"]
            if list(ids) != [token]:
                raise ValueError(
                    f"the tokenizer reads {spelled!r} as {list(ids)}, but the network was trained with {token}; name "
                    f"the tokenizer that belongs to the {self.template.name} checkpoint"
                )

    def row(self, prompt: str, grid: tuple[int, int, int]) -> list[int]:
        """The ids, one vision token for every merged patch of the grid.

        Raises ValueError for a prompt that contains a special token.
        """
        added = [token for token in self.tokenizer.get_added_vocab() if token in prompt]
        if added:
            raise ValueError(f"the prompt {prompt[:60]!r} contains the special token {added[0]!r}, which it must not")
        ids = self.tokenizer(render(self.template, self.text, prompt), add_special_tokens=False)["input_ids"]
        at = list(ids).index(self.tokens.vision)
        return [*ids[:at], *[self.tokens.vision] * token_count(grid), *ids[at + 1 :]]

    def details(self) -> Mapping[str, str]:
        """What rows are made of, to be recorded with the scores."""
        words = self.tokenizer.backend_tokenizer.to_str()
        return {
            "template_sha256": self.template.sha256,
            "tokenizer_sha256": hashlib.sha256(words.encode()).hexdigest(),
            "tokens": repr(self.tokens),
        }

    def rows(self, prompts: Sequence[str], grid: tuple[int, int, int]) -> list[list[int]]:
        """`row` of several prompts; equal ones are read once."""
        read = {prompt: self.row(prompt, grid) for prompt in dict.fromkeys(prompts)}
        return [read[prompt] for prompt in prompts]
