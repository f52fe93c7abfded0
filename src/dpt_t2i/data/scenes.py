"""The embedded world as records: drawn when asked for, so that it costs no disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from dpt_t2i.data.records import Expression, Negative, Record
from dpt_t2i.scenes.example import Example, Split, make_example, true_of
from dpt_t2i.scenes.facts import Fact
from dpt_t2i.scenes.language import Category
from dpt_t2i.scenes.render import render
from dpt_t2i.scenes.world import Box


class SceneRecords(Sequence[Record]):
    """`length` examples of a split at `size` pixels; record i is the same wherever and whenever it is drawn.

    Args:
        categories: record i is of the (i mod their number)-th; without any, of one drawn from the world's own mix.
    """

    def __init__(
        self,
        split: Split = "train",
        length: int = 100_000,
        size: int = 64,
        seed: int = 0,
        categories: Sequence[Category] = (),
    ) -> None:
        self.split, self.length, self.size, self.seed, self.categories = split, length, size, seed, categories

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int or slice, as every sequence
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not 0 <= index < self.length:
            raise IndexError(index)
        category = self.categories[index % len(self.categories)] if self.categories else None
        example = make_example(index, seed=self.seed, split=self.split, category=category)
        return scene_record(example, f"{self.split}-{self.seed}-{index:06d}", self.size)


def scene_record(example: Example, identity: str, size: int) -> Record:
    """One drawn example in the form that every source is brought to."""
    return Record(
        id=identity,
        source="scenes",
        image=partial(render, example.scene, size),
        captions=(example.caption.text,),
        expressions=tuple(
            Expression(r.text, (r.span,) * len(r.boxes), tuple(_pixels(box, size) for box in r.boxes))
            for r in example.expressions
        ),
        negatives=(Negative(example.negative.caption.text, example.negative.rule),),
        negative_image=partial(render, example.negative.scene, size),
        also_true=partial(_true_of_picture, example.caption.facts),
    )


def _true_of_picture(facts: Sequence[Fact], other: Record) -> bool:
    return isinstance(other.image, partial) and true_of(facts, other.image.args[0])


def _pixels(box: Box, size: int) -> Box:
    """xyxy fractions -> xywh pixels."""
    x0, y0, x1, y1 = (size * value for value in box)
    return (x0, y0, x1 - x0, y1 - y0)
