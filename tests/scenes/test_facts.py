import pytest

from dpt_t2i.scenes.facts import Fact, Phrase, Seen, judge

RED_CIRCLE = Seen("circle", "red", "small", (0.1, 0.1, 0.3, 0.3))
RED_CROSS = Seen("cross", "red", "large", (0.6, 0.1, 0.9, 0.4))
BLUE_CIRCLE = Seen("circle", "blue", "large", (0.1, 0.6, 0.4, 0.9))
ALL = (RED_CIRCLE, RED_CROSS, BLUE_CIRCLE)


@pytest.mark.parametrize(
    ("phrase", "hits"),
    [
        (Phrase("circle"), [True, False, True]),
        (Phrase("circle", "red"), [True, False, False]),
        (Phrase("circle", size="large"), [False, False, True]),
        (Phrase("cross", "red", "small"), [False, False, False]),
    ],
)
def test_a_phrase_matches_what_it_names(phrase, hits):
    assert [phrase.matches(seen) for seen in ALL] == hits


def test_an_attribute_that_could_not_be_told_matches_no_claim():
    blur = Seen("circle", None, "small", (0, 0, 0.2, 0.2))
    assert Phrase("circle").matches(blur)
    assert not Phrase("circle", "red").matches(blur)
    assert not Phrase("circle").matches(Seen(None, "red", "small", (0, 0, 0.2, 0.2)))


@pytest.mark.parametrize(("count", "holds"), [(1, False), (2, True), (3, False)])
def test_a_count_is_exact(count, holds):
    assert Fact("count", Phrase("circle"), count=count).holds(ALL) is holds


@pytest.mark.parametrize(
    ("first", "relation", "second", "holds"),
    [
        (Phrase("circle", "red"), "left", Phrase("cross"), True),
        (Phrase("cross"), "right", Phrase("circle", "red"), True),
        (Phrase("cross"), "left", Phrase("circle", "red"), False),
        (Phrase("circle"), "above", Phrase("circle"), True),  # the red one above the blue one
        (Phrase("circle", "red"), "above", Phrase("circle", "red"), False),  # nothing is above itself
        (Phrase("circle", "blue"), "below", Phrase("circle"), True),
        (Phrase("square"), "left", Phrase("cross"), False),
    ],
)
def test_relations(first, relation, second, holds):
    assert Fact("relation", first, relation=relation, other=second).holds(ALL) is holds


def test_a_prompt_is_right_when_all_its_facts_are():
    right, wrong = Fact("exists", Phrase("cross", "red")), Fact("exists", Phrase("triangle"))
    verdict = judge([right, wrong], ALL)
    assert verdict.facts == ((right, True), (wrong, False)) and not verdict.correct
    assert judge([right], ALL).correct
    assert verdict.seen == ALL


def test_extra_objects_are_allowed_and_counted():
    assert judge([Fact("exists", Phrase("cross"))], ALL).extra_objects == 2
    assert judge([Fact("count", Phrase("circle"), count=2)], ALL).extra_objects == 1
    assert judge([Fact("count", Phrase("circle"), count=4)], ALL).extra_objects == 1  # the cross
    # Each thing stands for one claim: the plain claim leaves the red circle to the one that needs it.
    claims = [Fact("exists", Phrase("circle")), Fact("exists", Phrase("circle", "red"))]
    assert judge(claims, ALL).extra_objects == 1
    assert judge(claims, [RED_CIRCLE]).extra_objects == 0
    two = [Fact("exists", Phrase("circle", "red")), Fact("exists", Phrase("cross"))]
    side = Fact("relation", Phrase("circle", "red"), relation="left", other=Phrase("cross"))
    assert judge([*two, side], ALL).extra_objects == 1  # a side asks for nothing more


def test_facts_in_words():
    small = Phrase("circle", "red", "small")
    assert str(Fact("exists", small)) == "there is a small red circle"
    assert str(Fact("count", Phrase("cross"), count=3)) == "there are exactly 3 of cross"
    assert str(Fact("relation", small, relation="below", other=Phrase("cross"))) == "small red circle is below cross"
