import math
from collections import Counter

import numpy as np
import pytest

from dpt_t2i.scenes.example import Example, make_example, true_of
from dpt_t2i.scenes.layout import fits
from dpt_t2i.scenes.referring import refer
from tests.scenes import reading


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [make_example(index) for index in range(3000)]


def holds(text: str, scene) -> bool:
    """Whether a caption, read by the second reader, is true of a scene's objects."""
    return all(_claim_holds(claim, scene.objects) for claim in reading.claims(text))


def _claim_holds(claim, things) -> bool:
    kind, wanted, *rest = claim
    hits = [t for t in things if reading._is(t, wanted)]
    if kind == "exists":
        return len(hits) > 0
    if kind == "count":
        return len(hits) == rest[0]
    side, landmark = rest
    others = [t for t in things if reading._is(t, landmark)]
    return any(a is not b and reading.side_of(a.box, b.box) == side for a in hits for b in others)


def held_out(example: Example) -> bool:
    """Whether anything of an example, said or drawn, is a held-out composition."""
    texts = [example.caption.text, example.negative.caption.text, *(e.text for e in example.expressions)]
    scenes = (example.scene, example.negative.scene)
    return any(map(reading.held_out_words, texts)) or any(reading.held_out_scene(s.objects) for s in scenes)


def test_an_example_follows_from_split_seed_and_index():
    first = make_example(5)
    assert make_example(5) == first
    others = [make_example(6), make_example(5, seed=1), make_example(5, split="val"), make_example(5, split="heldout")]
    assert all(other.scene != first.scene for other in others)
    assert make_example(5, category="counting").caption.category == "counting"


def test_captions_are_true_and_negatives_false(examples):
    for example in examples[:1000]:
        told, near = example.caption.text, example.negative.caption.text
        assert holds(told, example.scene), told
        assert not holds(near, example.scene), near
        assert holds(near, example.negative.scene), near
        assert not holds(told, example.negative.scene), told


def test_a_turned_side_is_turned_on_the_spot_where_there_is_room(examples):
    """Both stand about the same middle, on the same ground, and a little to the side that the caption told."""
    kept = total = 0
    for example in examples:
        if example.negative.rule != "turn_relation":
            continue
        total += 1
        (a, b), (c, d) = example.scene.objects, example.negative.scene.objects
        if not math.isclose(a.cx + b.cx, c.cx + d.cx) or not math.isclose(a.cy + b.cy, c.cy + d.cy):
            continue
        kept += 1
        assert (abs(a.cx - b.cx) > abs(a.cy - b.cy)) != (abs(c.cx - d.cx) > abs(c.cy - d.cy))
        wide = abs(a.cx - b.cx) > abs(a.cy - b.cy)
        assert (a.cx > b.cx) == (c.cx > d.cx) if wide else (a.cy > b.cy) == (c.cy > d.cy)
        assert example.negative.scene.background == example.scene.background
    assert total > 100 and kept > 0.25 * total


def test_a_picture_of_nothing_keeps_the_ground(examples):
    empty = [example for example in examples if example.negative.rule == "drop_object"]
    assert len(empty) > 50
    for example in empty:
        assert example.negative.scene.objects == () and example.negative.scene.background == example.scene.background
        assert refer(example.negative.scene, np.random.default_rng(0)) == ()
    assert all(e.negative.scene.objects for e in examples if e.negative.rule != "drop_object")


def test_the_judge_agrees_with_the_second_reader(examples):
    for one, other in zip(examples[:400], examples[1:], strict=False):  # captions held against a foreign scene
        assert true_of(one.caption.facts, other.scene) == holds(one.caption.text, other.scene), one.caption.text


def test_a_scene_shows_what_is_told_and_nothing_beside(examples):
    for example in examples[:1000]:
        claims = reading.claims(example.caption.text)
        told = sum(claim[2] if claim[0] == "count" else claim[0] == "exists" for claim in claims)
        assert len(example.scene.objects) == told
        assert fits(example.scene.objects) and fits(example.negative.scene.objects)


def test_every_expression_names_exactly_its_boxes(examples):
    for example in examples:
        assert 1 <= len(example.expressions) <= 4
        for expression in example.expressions:
            found = reading.referents(expression.text, example.scene.objects)
            assert sorted(t.box for t in found) == sorted(expression.boxes), expression.text
            assert len(found) == 1 or expression.text.startswith(("the two", "the three", "the four", "all the"))


def test_expression_spans_hold_the_naming_words(examples):
    for example in examples[:1000]:
        for expression in example.expressions:
            start, end = expression.span
            named = reading.thing(expression.text[start:end])
            first = next(o for o in example.scene.objects if o.box == expression.boxes[0])
            assert reading._is(first, named), expression.text


def test_expressions_are_of_many_kinds(examples):
    texts = [e.text for example in examples for e in example.expressions]
    kinds = Counter(
        "all" if t.startswith(("all the", "the two", "the three", "the four"))
        else "end" if t.endswith(tuple(reading.ENDS))
        else "side" if t.count("the ") > 1
        else "plain"
        for t in texts
    )  # fmt: skip
    assert min(kinds[k] for k in ("all", "end", "side", "plain")) > 0.01 * len(texts)


def test_training_holds_out_what_it_must(examples):
    assert not any(held_out(example) for example in examples)


@pytest.mark.slow
def test_training_holds_out_what_it_must_in_100_000():
    assert not any(held_out(make_example(index)) for index in range(3000, 103_000))


def test_validation_holds_out_the_same():
    assert not any(held_out(make_example(index, split="val")) for index in range(300))


def test_the_held_out_split_names_something_new_in_every_caption():
    for index in range(200):
        example = make_example(index, split="heldout")
        assert reading.held_out_words(example.caption.text), example.caption.text
        assert not reading.held_out_words(example.negative.caption.text)
        assert holds(example.caption.text, example.scene)


def test_every_category_and_rule_occurs(examples):
    categories = Counter(example.caption.category for example in examples)
    assert set(categories) == {
        "single_object", "two_objects", "counting", "colors", "position", "color_attribution", "several",
    }  # fmt: skip
    assert min(categories.values()) > 0.04 * len(examples)
    rules = Counter(example.negative.rule for example in examples)
    assert set(rules) == {
        "flip_relation", "turn_relation", "swap_objects", "swap_colors", "change_count", "replace_color",
        "replace_shape", "repeat_object", "drop_object",
    }  # fmt: skip
