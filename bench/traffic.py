"""Templated traffic by domain, as production traffic is: one system prompt, a few dozen templates, slots that vary.

A filled-in prompt belongs to exactly one split, by the hash of its text, so that what is measured was never trained on.
Everything is deterministic: a domain and a seed name the same prompts in the same order on every machine.
"""

import hashlib
import itertools
import random
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from bench import templates

Split = Literal["train", "measure"]
MEASURE_SHARE = 0.2


def split_of(text: str) -> Split:
    """The one split that this filled-in user message belongs to."""
    first = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return "measure" if first < MEASURE_SHARE * 2**32 else "train"


@dataclass(frozen=True)
class Prompt:
    """One request of a domain."""

    domain: str
    system: str
    user: str
    max_tokens: int
    example: tuple[str, str] | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The OpenAI chat messages."""
        shown = zip(("user", "assistant"), self.example or (), strict=False)
        turns = [("system", self.system), *shown, ("user", self.user)]
        return [{"role": role, "content": content} for role, content in turns]


@dataclass(frozen=True)
class Domain:
    """A workload. `templates` carry `{slot}` fields; `slots` names the values that each may take.

    `example` is a question with its answer that goes before every prompt, which shows the model the format.
    """

    name: str
    system: str
    templates: tuple[str, ...]
    slots: Mapping[str, Sequence[str]]
    example: tuple[str, str] | None = None
    max_tokens: int = 80

    @cached_property
    def filled(self) -> tuple[str, ...]:
        """Every distinct filled-in user message, sorted."""
        return tuple(sorted({text for template in self.templates for text in _fill(template, self.slots)}))

    def prompts(self, split: Split, seed: int = 0) -> list[Prompt]:
        """Every prompt of `split` once, in the order that `seed` gives; templates are mixed evenly."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        by_template: list[list[str]] = []
        for template in self.templates:
            texts = [text for text in sorted(set(_fill(template, self.slots))) if split_of(text) == split]
            rng.shuffle(texts)
            by_template.append(texts)
        order: list[str] = []
        for layer in itertools.zip_longest(*by_template):
            block = [text for text in layer if text is not None]
            rng.shuffle(block)
            order.extend(block)
        return [Prompt(self.name, self.system, text, self.max_tokens, self.example) for text in dict.fromkeys(order)]

    def endless(self, split: Split, seed: int = 0) -> Iterator[Prompt]:
        """`prompts`, again and again with the next seed."""
        for round_seed in itertools.count(seed):
            yield from self.prompts(split, round_seed)


def overlaps(a: Sequence[Prompt], b: Sequence[Prompt]) -> int:
    """How many of `a`'s prompts occur, word for word, in `b`."""
    known = {prompt.user for prompt in b}
    return sum(prompt.user in known for prompt in a)


def _fill(template: str, slots: Mapping[str, Sequence[str]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))
    for values in itertools.product(*(slots[name] for name in names)):
        yield template.format(**dict(zip(names, values, strict=True)))


DOMAINS: Mapping[str, Domain] = {
    "code": Domain("code", templates.CODE_SYSTEM, templates.CODE, templates.CODE_SLOTS),
    "french": Domain(
        "french", templates.FRENCH_SYSTEM, templates.FRENCH, templates.FRENCH_SLOTS, templates.FRENCH_EXAMPLE
    ),
    "maths": Domain("maths", templates.MATHS_SYSTEM, templates.MATHS, templates.MATHS_SLOTS),
    "json": Domain("json", templates.JSON_SYSTEM, templates.JSON, templates.JSON_SLOTS, templates.JSON_EXAMPLE),
}
