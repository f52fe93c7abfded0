"""Which prompts an alignment run uses."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, zip_longest

from dpt_t2i.scenes.prompts import SuitePrompt, load_suite


@dataclass(frozen=True)
class NumberedPrompt:
    """A prompt with its place in the whole suite, which names its image files whatever part of the suite is used."""

    index: int
    prompt: SuitePrompt


def open_suite(name: str, max_prompts: int | None = None) -> list[NumberedPrompt]:
    """The prompts of a suite in their order; of a part, `max_prompts` in turn from every category, so that each has its
    share.

    Raises:
        InputError: no suite has this name.
    """
    numbered = [NumberedPrompt(index, prompt) for index, prompt in enumerate(load_suite(name))]
    if max_prompts is None:
        return numbered
    categories = dict.fromkeys(n.prompt.category for n in numbered)
    groups = [[n for n in numbered if n.prompt.category == category] for category in categories]
    in_turn = [n for n in chain.from_iterable(zip_longest(*groups)) if n is not None]
    return sorted(in_turn[:max_prompts], key=lambda n: n.index)
