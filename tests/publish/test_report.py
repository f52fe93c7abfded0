"""The page: it stands alone, and says what the JSON says."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpt_t2i.publish.report import best_arms, sentence, write_report

VOID = {"meta", "img", "input", "br", "link", "rect", "path", "use", "circle"}


class Page(HTMLParser):
    """Checks that tags close in order; collects attributes, texts and the cells of the accuracy table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[tuple[str, str], str] = {}
        self.best: set[tuple[str, str]] = set()
        self.texts: list[str] = []
        self._cell: tuple[str, str] | None = None
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "td" and found.get("data-arm"):
            self._cell = (str(found["data-arm"]), str(found["data-column"]))
            if found.get("class") == "best":
                self.best.add(self._cell)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("style", "script") and data.strip():
            self.texts.append(data.strip())
        if self._cell and data.strip():
            self.cells[self._cell] = data.strip()
            self._cell = None


@pytest.fixture(scope="module")
def page(alignment: dict[str, Any], arms_folder: Path) -> Page:
    metrics = arms_folder.parent / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {i}, "split": "train", "loss": {9 - i}}}\n' for i in range(5)))
    share = {"accuracy": 0.625, "low": 0.5, "high": 0.75, "count": 8}
    precisions = {f"{p}precision@{k}": share for p in ("", "giou_") for k in (1, 5, 10)}
    probe = {
        "itm": {"examples": 8, "timesteps": {"500": {"text": share, "rules": {}}}},
        "rec": {"examples": 8, "timesteps": {"500": precisions}, "oracle": {"500": precisions}},
    }
    path = write_report(
        arms_folder.parent / "new" / "report.html",
        alignment,
        arms_folder,
        {"tune": metrics},
        probe,
        "Title <1>",
        ["A note."],
    )
    return Page(path.read_text(encoding="utf-8"))


def test_nothing_is_fetched_from_anywhere(page: Page, arms_folder: Path) -> None:
    text = (arms_folder.parent / "new" / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#"))


def test_the_table_says_what_the_json_says(page: Page, alignment: dict[str, Any]) -> None:
    assert set(page.cells) == {(arm, column) for arm, numbers in alignment["arms"].items() for column in numbers}
    for (arm, column), shown in page.cells.items():
        assert float(shown) == pytest.approx(100 * alignment["arms"][arm][column], abs=0.05)
    assert page.best == {
        ("base", "overall"), ("dpt", "overall"), ("dpt", "two_objects"), ("base", "counting"),
        ("dpt", "extra_objects"), ("random", "extra_objects"),
    }  # fmt: skip


def test_the_differences_are_said_in_words(page: Page) -> None:
    assert "dpt beats base by 12.3 points (95 % interval +5.0 to +20.0)." in page.texts
    assert (
        "No clear difference between dpt and random: \u22121.0 points (95 % interval \u22124.0 to +2.0)." in page.texts
    )
    assert sentence("a-b", {"mean": -0.1, "low": -0.2, "high": -0.001}).startswith("a loses to b by 10.0 points")


def test_the_categories_differences_stand_in_a_table(page: Page) -> None:
    start = page.texts.index("dpt \u2212 base")
    assert page.texts[start + 1 : start + 7] == [
        "+50.0", "+25.0 to +75.0", "\u221250.0", "\u2212100.0 to +0.0", "\u221212.5", "\u221220.0 to +10.0"
    ]  # fmt: skip


def test_images_are_those_of_the_arms(page: Page) -> None:
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    colors = []
    for uri in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(str(uri).split(",")[1])))
        assert image.size == (64, 64)
        colors.append(image.getpixel((0, 0)))
    # The grid: a row a prompt at the first seed, base beside dpt; then the broken prompt at the seed that was lost.
    assert colors == [(4, 0, 4), (4, 0, 3), (9, 0, 4), (9, 0, 3), (9, 1, 4), (9, 1, 3)]
    assert page.texts.count("✓ right") == 5 and page.texts.count("✗ wrong") == 1
    assert page.texts.count("not: there is a red circle") == 1 and "not: there is a star" not in page.texts
    assert "2 more than asked" in page.texts


def test_boxes_and_words_share_a_colour(page: Page) -> None:
    boxes = {str(a["class"]): a for tag, a in page.tags if tag == "rect" and a.get("class")}
    assert [float(str(boxes["p1"][key])) for key in ("x", "y", "width", "height")] == [8, 16, 16, 16]
    marks = [a["class"] for tag, a in page.tags if tag == "mark"]
    assert marks == ["p1", "p2"] and "red circle" in page.texts and "red circle: confidence 0.90" in page.texts


def test_text_of_prompts_and_settings_is_escaped(page: Page, arms_folder: Path) -> None:
    text = (arms_folder.parent / "new" / "report.html").read_text(encoding="utf-8")
    assert "<b>star" not in text and "Title &lt;1&gt;" in text and "&lt;&amp;&gt;" in text
    assert "A note." in page.texts and "dpt evaluate alignment --suite dev" in page.texts


def test_figures_and_probe_tables_are_there(page: Page) -> None:
    labels = {attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"}
    assert "Training curves of tune" in labels and len(labels - {None}) == 3
    assert "62.5" in page.texts and page.texts.count("50.0\u201375.0") == 5


def test_a_report_of_numbers_alone(alignment: dict[str, Any], tmp_path: Path) -> None:
    plain = {**alignment, "differences": {}, "fixed": {}, "broken": {}}
    path = write_report(tmp_path / "report.html", plain, tmp_path / "missing")
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.cells) == 12 and not [tag for tag, _ in page.tags if tag == "img"]
    assert not [
        a for tag, a in page.tags if tag == "section" and a["id"] in ("images", "worse", "training", "differences")
    ]


def test_equal_inputs_give_equal_bytes(alignment: dict[str, Any], arms_folder: Path, tmp_path: Path) -> None:
    first, second = (write_report(tmp_path / f"{n}.html", alignment, arms_folder).read_bytes() for n in ("one", "two"))
    assert first == second


def test_no_arm_is_best_where_all_are_equal(alignment: dict[str, Any]) -> None:
    arms = {name: {**numbers, "counting": 0.5} for name, numbers in alignment["arms"].items()}
    assert best_arms({**alignment, "arms": arms})["counting"] == set()
