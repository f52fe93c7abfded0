"""Figures: what is in them, and that they fit into a page."""

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from dpt_t2i.publish.figures import accuracy_bars, difference_plot, training_curves

ROWS: list[dict[str, Any]] = [
    {"step": 0, "split": "val", "itm_text": 0.5},
    {"step": 10, "split": "train", "loss": 3.0, "loss_i2t": 1.0, "loss_t2i": float("nan")},
    {"step": 20, "split": "train", "loss": 2.0, "loss_i2t": 0.5, "loss_t2i": None},
]


def texts(svg: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


@pytest.fixture(scope="module")
def figures(alignment: dict[str, Any]) -> list[str]:
    curves = training_curves("my run", ROWS)
    assert curves is not None
    return [accuracy_bars(alignment), difference_plot(alignment), curves]


def test_a_figure_is_one_clean_element(figures: list[str]) -> None:
    for svg in figures:
        assert svg.startswith("<svg ") and "http" not in svg and "<?xml" not in svg
        assert not re.search(r"#00000[1-9a]", svg)  # every stand-in became a variable of the page
        assert "var(--" in svg
        ElementTree.fromstring(svg.replace("xlink:href", "href"))  # well-formed
        assert not re.search(r'<g id="', svg)


def test_bars_name_arms_categories_and_values(figures: list[str]) -> None:
    found = texts(figures[0])
    assert {"base", "dpt", "random", "overall", "two objects", "counting"} <= set(found)
    assert found.count("100") == 2 and found.count("33") == 1  # two bars of 100 %, one of 33 %


def test_differences_are_named(figures: list[str]) -> None:
    assert {"dpt \u2212 base", "dpt \u2212 random"} <= set(texts(figures[1]))


def test_curves_show_what_was_logged_and_nothing_else(figures: list[str]) -> None:
    titles = set(texts(figures[2]))
    assert {"training loss, weighted sum", "matching losses", "held-out matching accuracy"} <= titles
    assert "denoising loss" not in titles and "text to image" not in titles  # never logged; logged as NaN only
    assert training_curves("empty", []) is None
