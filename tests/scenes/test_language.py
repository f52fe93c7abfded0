from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from dpt_t2i.scenes.facts import Fact, Phrase
from dpt_t2i.scenes.language import (
    CATEGORIES,
    COLOR_WORDS,
    COUNT_WORDS,
    JOINS,
    PREFIXES,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Caption,
    Mention,
    Plan,
    caption,
    dress,
    plan_held_out,
)
from dpt_t2i.scenes.plans import draw_plan
from dpt_t2i.scenes.world import COLORS, SHAPES, SIZES
from tests.scenes import reading

RED_CIRCLE, BLUE_CROSS, SMALL_SQUARE = Phrase("circle", "red"), Phrase("cross", "blue"), Phrase("square", size="small")


def claims(told: Caption) -> list[tuple]:
    """The facts of a caption in the form of the second reader."""
    return [_claim(fact) for fact in told.facts]


def _claim(fact: Fact) -> tuple:
    subject = _thing(fact.phrase)
    if fact.kind == "count":
        return ("count", subject, fact.count)
    if fact.kind == "relation":
        return ("relation", subject, fact.relation, _thing(fact.other))
    return ("exists", subject)


def _thing(phrase: Phrase) -> reading.Thing:
    return reading.Thing(phrase.shape, phrase.color, phrase.size)


def test_texts_by_hand():
    pair = (Mention(RED_CIRCLE), Mention(BLUE_CROSS))
    position = Plan("position", pair, relation="left")
    assert caption(position).text == "a red circle left of a blue cross"
    assert caption(replace(position, prefix=1, relation_word=3, relation="right")).text == (
        "a photo of a red circle on the right side of a blue cross"
    )
    assert caption(Plan("two_objects", pair, join=2)).text == "a red circle together with a blue cross"
    several = Plan("several", (*pair, Mention(SMALL_SQUARE, shape_word=1, size_word=2)), prefix=5)
    assert caption(several).text == "a scene with a red circle, a blue cross and a tiny box"
    assert caption(Plan("counting", pair[:1], count=3, count_word=1)).text == "exactly three red circles"
    assert caption(Plan("counting", pair[:1], count=1)).text == "one red circle"
    crosses = Mention(Phrase("cross", "purple"), shape_word=1, color_word=1)
    assert caption(Plan("counting", (crosses,), count=4, count_word=2)).text == "4 violet plus signs"


def test_every_word_of_every_template_says_what_it_claims():
    """All words and all synonyms, read back by a grammar that shares no table with the writer."""
    words = list(product(SHAPES, range(2), COLORS, range(2), SIZES, range(3)))
    mentions = [Mention(Phrase(s, c, z), i, j, k) for s, i, c, j, z, k in words]
    for prefix, mention in product(range(len(PREFIXES)), mentions):
        told = caption(Plan("colors", (mention,), prefix=prefix))
        assert reading.claims(told.text) == claims(told), told.text
    pair = (Mention(RED_CIRCLE), Mention(BLUE_CROSS))
    for prefix, relation, word in product(range(len(PREFIXES)), RELATION_WORDS, range(4)):
        told = caption(Plan("position", pair, relation=relation, prefix=prefix, relation_word=word))
        assert reading.claims(told.text) == claims(told), told.text
    for prefix, join in product(range(len(PREFIXES)), range(len(JOINS))):
        for count in (2, 3, 4):
            told = caption(Plan("several", (*pair, *pair)[:count], prefix=prefix, join=join))
            assert reading.claims(told.text) == claims(told), told.text
    for prefix, count, word, mention in product(range(2), COUNT_WORDS, range(3), mentions):
        told = caption(Plan("counting", (mention,), count=count, prefix=prefix, count_word=word))
        assert reading.claims(told.text) == claims(told), told.text


@pytest.mark.parametrize("category", [*CATEGORIES, "several"])
def test_random_plans_say_what_they_claim(category):
    rng = np.random.default_rng(0)
    for _ in range(150):
        told = caption(draw_plan(category, rng))
        assert reading.claims(told.text) == claims(told), told.text
        assert told.category == category


def test_spans_hold_the_naming_words():
    rng = np.random.default_rng(1)
    for category in (*CATEGORIES, "several"):
        for _ in range(60):
            plan = draw_plan(category, rng)
            told = caption(plan)
            assert len(told.spans) == len(plan.mentions)
            for (start, end), mention in zip(told.spans, plan.mentions, strict=True):
                assert reading.thing(told.text[start:end]) == _thing(mention.phrase)
                assert told.text[start - 1] == " "  # the article or the number stands before it


def test_the_article_follows_the_sound():
    mentions = [Mention(Phrase("triangle", color), color_word=word) for color in COLORS for word in (0, 1)]
    texts = {caption(Plan("colors", (mention,))).text for mention in mentions}
    assert {text for text in texts if text.startswith("an ")} == {
        "an orange triangle", "an amber triangle", "an emerald triangle", "an azure triangle",
    }  # fmt: skip


def test_synonyms_survive_a_change_of_what_is_named():
    mention = Mention(Phrase("circle", "red", "small"), shape_word=1, color_word=1, size_word=2)
    assert mention.words() == "tiny scarlet disc"
    assert replace(mention, phrase=Phrase("triangle", "black", "large")).words() == "huge black triangle"


def test_tables_name_each_thing_of_the_world_once():
    assert set(SHAPE_WORDS) == set(SHAPES) and set(COLOR_WORDS) == set(COLORS) and set(SIZE_WORDS) == set(SIZES)
    for table in (COLOR_WORDS, SIZE_WORDS, RELATION_WORDS, COUNT_WORDS):
        words = [word for row in table.values() for word in row]
        assert len(words) == len(set(words))


def test_dress_changes_words_and_never_claims():
    rng = np.random.default_rng(2)
    plain = Plan("position", (Mention(RED_CIRCLE), Mention(BLUE_CROSS)), relation="above")
    dressed = [dress(plain, rng) for _ in range(800)]
    assert {caption(p).facts for p in dressed} == {caption(plain).facts}
    common = np.mean([p.mentions[0].color_word == 0 for p in dressed])
    assert 0.70 < common < 0.80
    assert len({caption(p).text for p in dressed}) > 90  # of 7 x 3 x 2^4


def test_held_out_plans():
    def plan(first: Phrase, second: Phrase, relation=None) -> Plan:
        return Plan("position", (Mention(first), Mention(second)), relation=relation)

    assert plan_held_out(plan(Phrase("triangle", "yellow"), SMALL_SQUARE))
    assert plan_held_out(plan(SMALL_SQUARE, Phrase("cross", "green")))
    assert plan_held_out(plan(BLUE_CROSS, RED_CIRCLE, "above"))
    assert plan_held_out(plan(RED_CIRCLE, BLUE_CROSS, "below"))
    assert not plan_held_out(plan(BLUE_CROSS, RED_CIRCLE))
    assert not plan_held_out(plan(RED_CIRCLE, BLUE_CROSS, "above"))
