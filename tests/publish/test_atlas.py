"""The atlas's page and picture say what `atlas.json` says."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpt_t2i.publish.atlas import heat_map, heat_map_svg, write_atlas_picture, write_atlas_report
from tests.publish.test_figures import texts
from tests.publish.test_report import Page


def share(accuracy: float) -> dict[str, float]:
    return {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "count": 8}


@pytest.fixture
def atlas() -> dict[str, Any]:
    rows = {"mid": {"250": 0.4, "750": 0.5}, "blocks.<1>": {"250": 0.8, "750": 0.65}}
    cells = {
        tap: {t: {"itm_text": share(value), "loss_i2t": 0.5 + value} for t, value in row.items()}
        for tap, row in rows.items()
    }
    return {
        "base": "b",
        "examples": 8,
        "taps": {tap: {"channels": 4, "stride": 2} for tap in cells},
        "buckets": [{"low": 0, "high": 499, "middle": 250}, {"low": 500, "high": 999, "middle": 750}],
        "cells": cells,
        "best": {"itm_text": {"tap": "blocks.<1>", "timestep": 250, "accuracy": 0.8}},
        "settings": {"seed": 0},
        "command": "dpt probe --taps all",
        "versions": {"torch": "2"},
    }


def test_the_map_names_taps_and_timesteps_and_shades_from_lowest_to_highest(atlas: dict[str, Any]) -> None:
    figure = heat_map(atlas, "blue")
    (axes,) = figure.axes
    # 40 % is clear, 80 % darkest, 50 % a quarter and 65 % five eighths of the way
    assert [patch.get_alpha() / 0.85 for patch in axes.patches] == pytest.approx([0.0, 0.25, 1.0, 0.625])
    shown = texts(heat_map_svg(atlas))
    assert {"mid", "blocks.&lt;1&gt;", "250", "750", "40", "80", "matching, text side, %"} <= set(shown)


def test_a_map_of_equal_cells_is_clear(atlas: dict[str, Any]) -> None:
    for row in atlas["cells"].values():
        for cell in row.values():
            cell["itm_text"] = share(0.5)
    assert {patch.get_alpha() for patch in heat_map(atlas, "blue").axes[0].patches} == {0.0}


def test_the_picture_is_on_white(atlas: dict[str, Any], tmp_path: Path) -> None:
    image = Image.open(write_atlas_picture(tmp_path / "new" / "atlas.png", atlas)).convert("RGB")
    assert image.getpixel((0, 0)) == (255, 255, 255) and set(image.info) == {"dpi"}
    colors = {color for _, color in image.getcolors(1 << 20) or ()}
    assert not any(max(color) == color[2] and 0 < color[2] < 12 for color in colors), "no stand-in is left"


def test_the_page_has_every_number_and_stands_alone(atlas: dict[str, Any], tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {i}, "split": "train", "loss": {9 - i}}}\n' for i in range(3)))
    text = write_atlas_report(tmp_path / "report.html", atlas, metrics).read_text(encoding="utf-8")
    page = Page(text)
    values = [attributes for tag, attributes in page.tags if tag == "td" and attributes.get("data-tap")]
    assert [(v["data-tap"], v["data-column"]) for v in values] == [
        (tap, f"itm_text {t}") for tap in atlas["cells"] for t in ("250", "750")
    ]
    assert [v.get("class") for v in values] == [None, None, "best", "best"], "above chance are 70-90 and 55-75"
    assert {"40.0", "80.0", "65.0", "1.300", "dpt probe --taps all"} <= set(page.texts)
    assert "Best matching, text side: 80.0 % at blocks.<1>, t = 250." in page.texts
    assert "http" not in text and "Training curves of probes" in text
    assert "grounding" not in " ".join(page.texts).split("Heat map")[1].split("How this was made")[0]
