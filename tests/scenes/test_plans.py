from collections import Counter

import numpy as np
import pytest

from dpt_t2i.scenes.facts import Phrase
from dpt_t2i.scenes.language import CATEGORIES, Mention, Plan, caption, plan_held_out
from dpt_t2i.scenes.plans import TRAINING_MIX, draw_plan, near_plans
from tests.scenes import reading

ALL = (*CATEGORIES, "several")
RED_CIRCLE, BLUE_TRIANGLE = Mention(Phrase("circle", "red")), Mention(Phrase("triangle", "blue"))


def test_the_mix_is_a_share_of_each_category():
    assert set(TRAINING_MIX) == set(ALL) and sum(TRAINING_MIX.values()) == pytest.approx(1)


@pytest.mark.parametrize("category", ALL)
def test_training_plans_and_their_negatives_hold_nothing_out(category):
    rng = np.random.default_rng(0)
    for _ in range(100):
        plan = draw_plan(category, rng)
        assert not reading.held_out_words(caption(plan).text)
        nears = list(near_plans(plan, rng))
        assert nears
        for near, rule in nears:
            told = caption(near)
            assert not reading.held_out_words(told.text), told.text
            assert told.facts != caption(plan).facts, told.text
            assert (near.count == 0) == (rule == "drop_object")
            like = ("counting", 1) if rule == "repeat_object" else (plan.category, len(plan.mentions))
            assert (near.category, len(near.mentions)) == like


@pytest.mark.parametrize("category", ["counting", "colors", "position", "color_attribution"])
def test_held_out_plans_name_something_held_out(category):
    rng = np.random.default_rng(0)
    for _ in range(60):
        plan = draw_plan(category, rng, held_out=True)
        assert plan_held_out(plan) and reading.held_out_words(caption(plan).text)
        for near, _ in near_plans(plan, rng):
            assert not reading.held_out_words(caption(near).text)


@pytest.mark.parametrize("category", ["single_object", "two_objects"])
def test_what_names_no_composition_cannot_be_held_out(category):
    with pytest.raises(ValueError, match=category):
        draw_plan(category, np.random.default_rng(0), held_out=True)


def test_categories_have_their_form():
    rng = np.random.default_rng(3)
    for _ in range(80):
        assert len(draw_plan("single_object", rng).mentions) == 1
        (mention,) = draw_plan("colors", rng).mentions
        assert mention.phrase.color
        first, second = (m.phrase for m in draw_plan("two_objects", rng).mentions)
        assert first.shape != second.shape and not first.color and not second.color
        assert draw_plan("counting", rng).count in (2, 3, 4)
        position = draw_plan("position", rng)
        assert position.relation and position.mentions[0].phrase != position.mentions[1].phrase
        a, b = (m.phrase for m in draw_plan("color_attribution", rng).mentions)
        assert a.color and b.color and a != b
        assert len({m.phrase for m in draw_plan("several", rng).mentions}) in (3, 4)


def near(plan: Plan) -> dict[str, set[str]]:
    """All negatives over many lots: rule -> texts."""
    found: dict[str, set[str]] = {}
    rng = np.random.default_rng(0)
    for _ in range(60):
        for other, rule in near_plans(plan, rng):
            found.setdefault(rule, set()).add(caption(other).text)
    return found


def test_negatives_of_a_side_by_hand():
    red_triangle, yellow_cross = Mention(Phrase("triangle", "red")), Mention(Phrase("cross", "yellow"))
    rules = near(Plan("position", (red_triangle, yellow_cross), relation="left"))
    assert rules["flip_relation"] == {"a red triangle right of a yellow cross"}
    assert rules["turn_relation"] == {"a red triangle above a yellow cross", "a red triangle below a yellow cross"}
    assert rules["swap_objects"] == {"a yellow cross left of a red triangle"}
    assert "swap_colors" not in rules  # a yellow triangle is held out
    # Each colour but its own and the held-out one: no white triangle, no green cross.
    others = {f"{article} triangle" for article in ("an orange", "a green", "a blue", "a purple", "a black")}
    beside = {f"{article} cross" for article in ("a red", "an orange", "a blue", "a purple", "a black", "a white")}
    assert rules["replace_color"] == {f"{other} left of a yellow cross" for other in others} | {
        f"a red triangle left of {other}" for other in beside
    }
    # No square: one left of a cross and one right of a triangle are held out. No yellow triangle.
    assert rules["replace_shape"] == {
        "a red circle left of a yellow cross",
        "a red cross left of a yellow cross",
        "a red triangle left of a yellow circle",
    }


def test_negatives_of_two_colours_by_hand():
    rules = near(Plan("color_attribution", (Mention(Phrase("circle", "green")), BLUE_TRIANGLE)))
    assert "swap_colors" not in rules  # a blue circle is held out
    rules = near(Plan("color_attribution", (Mention(Phrase("circle", "green")), Mention(Phrase("square", "white")))))
    assert rules["swap_colors"] == {"a white circle and a green square"}
    same = Plan("color_attribution", (RED_CIRCLE, Mention(Phrase("circle", "green"))))
    assert "swap_colors" not in near(same)  # it would say the same again
    assert "a green circle and a green circle" not in near(same)["replace_color"]


def test_negatives_of_a_number_by_hand():
    assert near(Plan("counting", (RED_CIRCLE,), count=4))["change_count"] == {"three red circles"}
    assert near(Plan("counting", (RED_CIRCLE,), count=2))["change_count"] == {"one red circle", "three red circles"}


def test_negatives_of_two_things_by_hand():
    rules = near(Plan("two_objects", (Mention(Phrase("triangle")), Mention(Phrase("square", size="small")))))
    assert rules["repeat_object"] == {"two triangles", "two small squares"}
    assert rules["replace_shape"] == {
        "a circle and a small square", "a cross and a small square", "a square and a small square",
        "a triangle and a small circle", "a triangle and a small cross", "a triangle and a small triangle",
    }  # fmt: skip
    rng = np.random.default_rng(5)
    firsts = Counter(next(near_plans(draw_plan("two_objects", rng), rng))[1] for _ in range(200))
    assert set(firsts) == {"repeat_object", "replace_shape"} and min(firsts.values()) > 60


def test_negatives_of_one_thing_say_that_it_is_not_there_by_hand():
    rules = near(Plan("single_object", (Mention(Phrase("cross", size="small"), shape_word=1),), prefix=1))
    assert rules["drop_object"] == {"a photo of no small plus signs"}
    assert near(Plan("colors", (RED_CIRCLE,)))["drop_object"] == {"no red circles"}
    rng = np.random.default_rng(5)
    firsts = Counter(next(near_plans(draw_plan("single_object", rng), rng))[1] for _ in range(200))
    assert set(firsts) == {"drop_object", "replace_shape"} and min(firsts.values()) > 60
    for category in set(ALL) - {"single_object", "colors"}:
        assert "drop_object" not in near(draw_plan(category, rng))


def test_the_closest_negatives_come_first():
    rng = np.random.default_rng(5)
    firsts = Counter(next(near_plans(draw_plan("position", rng), rng))[1] for _ in range(200))
    assert firsts["flip_relation"] > 25 and firsts["swap_objects"] > 25 and firsts["turn_relation"] > 50
    assert sum(n for rule, n in firsts.items() if rule.startswith("replace")) < 40  # where all swaps are held out


def test_plans_follow_from_their_generator():
    for category in ALL:
        first, again = (draw_plan(category, np.random.default_rng(9)) for _ in range(2))
        assert first == again
