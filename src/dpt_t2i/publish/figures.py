"""Figures as inline SVG, whose colours are the page's own, so that they follow light and dark.

Each function takes plain JSON and returns an `<svg>` element: no script, no font, no link to anywhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# matplotlib wants colours; these stand for the page's variables and are swapped in the finished text.
INK, MUTED, LINE = "#000001", "#000002", "#000003"
BASELINE, CONTROL, TUNED = "#000004", "#000005", "#000006"
SERIES = ("#000007", "#000008", "#000009", "#00000a")
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    BASELINE: "var(--baseline)",
    CONTROL: "var(--control)",
    TUNED: "var(--tuned)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)},
}
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "figure.constrained_layout.hspace": 0.06,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
}
# What is drawn of a `metrics.jsonl`: title, split, keys -> names
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("training loss, weighted sum", "train", {"loss": "loss"}),
    ("matching losses", "train", {"loss_i2t": "image to text", "loss_t2i": "text to image"}),
    (
        "grounding losses",
        "train",
        {"loss_ce": "tokens", "loss_bbox": "L1", "loss_giou": "GIoU", "loss_align": "alignment"},
    ),
    ("denoising loss", "train", {"loss_mse": "MSE"}),
    ("held-out matching accuracy", "val", {"itm_text": "text side", "itm_image": "image side"}),
    ("held-out grounding", "val", {"rec_p1": "P@1", "rec_p5": "P@5", "rec_p10": "P@10"}),
)


def accuracy_bars(alignment: Mapping[str, Any]) -> str:
    """A panel a category, a bar an arm, with its 95 % interval."""
    arms = list(alignment["arms"])
    groups = ["overall", *alignment["categories"]]
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    with rc_context({**STYLE, "svg.hashsalt": "bars"}):
        figure = Figure(figsize=(2.75 * columns, rows * (0.8 + 0.27 * len(arms))), layout="constrained")
        for place, group in enumerate(groups):
            axes = figure.add_subplot(rows, columns, place + 1)
            _bar_panel(axes, alignment, arms, group, labelled=place % columns == 0)
        return to_svg(figure, "Share of right images, by category and arm, with 95 % intervals")


def difference_plot(alignment: Mapping[str, Any]) -> str:
    """The paired differences of overall accuracy, one a line, with 95 % intervals and a line at zero."""
    differences = list(alignment["differences"].items())
    with rc_context({**STYLE, "svg.hashsalt": "differences"}):
        figure = Figure(figsize=(8.2, 0.85 + 0.36 * len(differences)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=MUTED, linewidth=1)
        for line, (_, d) in enumerate(differences):
            color = TUNED if d["low"] > 0 else CONTROL if d["high"] < 0 else BASELINE
            axes.plot(
                [100 * d["low"], 100 * d["high"]], [line, line], color=color, linewidth=2.5, solid_capstyle="round"
            )
            axes.plot(100 * d["mean"], line, "o", color=color, markersize=7)
        axes.set_yticks(range(len(differences)), [pair_name(pair) for pair, _ in differences])
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.set_xlabel("points of overall accuracy")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return to_svg(figure, "Paired differences between arms, with 95 % intervals")


def training_curves(name: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Losses and held-out figures of one run over steps; None if there is nothing to draw."""
    panels = [(title, lines) for title, split, keys in PANELS if (lines := _lines(rows, split, keys))]
    if not panels:
        return None
    columns = min(3, len(panels))
    count = -(-len(panels) // columns)
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.6 * columns, 2.4 * count), layout="constrained")
        for place, (title, lines) in enumerate(panels):
            axes = figure.add_subplot(count, columns, place + 1)
            _curve_panel(axes, title, lines)
            if place >= len(panels) - columns:
                axes.set_xlabel("step")
        return to_svg(figure, f"Training curves of {name}")


def pair_name(pair: str) -> str:
    """`dpt-base` -> `dpt - base`, with a true minus."""
    return pair.replace("-", " \u2212 ")


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` for an HTML page, the same bytes for the same figure."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows the namespaces
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids must be unique on a page
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def family(arm: str) -> str:
    """Colour of an arm: that of the plain model, of a control, or of what was tuned."""
    if arm.startswith("base"):
        return BASELINE
    return CONTROL if arm.startswith(("control", "random")) else TUNED


def _bar_panel(axes: Axes, alignment: Mapping[str, Any], arms: Sequence[str], group: str, labelled: bool) -> None:
    for line, arm in enumerate(arms):
        value = 100 * alignment["arms"][arm][group]
        interval = alignment["intervals"][arm][group]
        low, high = 100 * interval["low"], 100 * interval["high"]
        axes.barh(line, value, height=0.62, color=family(arm))
        axes.plot([low, high], [line, line], color=INK, linewidth=1.1)
        axes.text(max(value, high) + 2, line, f"{value:.0f}", va="center", fontsize=9)
    axes.set_title(group.replace("_", " "), fontweight="bold" if group == "overall" else "normal")
    axes.set_xlim(0, 112)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
    axes.set_yticks(range(len(arms)), arms if labelled else [""] * len(arms))
    axes.tick_params(axis="y", length=0)


def _curve_panel(axes: Axes, title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for (name, points), color in zip(lines.items(), SERIES, strict=False):
        steps, values = zip(*points, strict=True)
        smooth = _running_mean(values, max(1, len(values) // 25))
        if len(values) > 50:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
        axes.plot(steps, smooth, color=color, linewidth=1.8, label=name, marker="o" if len(values) < 3 else None)
    axes.set_title(title)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if len(lines) > 1:
        axes.legend(ncols=2, loc="best", handlelength=1.2, columnspacing=1.0)


def _lines(
    rows: Iterable[Mapping[str, Any]], split: str, keys: Mapping[str, str]
) -> dict[str, list[tuple[float, float]]]:
    """name -> points (step, value) of the rows of a split that have a finite value."""
    mine = [row for row in rows if row.get("split") == split]
    lines = {
        name: [
            (row["step"], row[key]) for row in mine if isinstance(row.get(key), int | float) and row[key] == row[key]
        ]
        for key, name in keys.items()
    }
    return {name: points for name, points in lines.items() if points}


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the `window` values around each one, fewer at the ends."""
    reach = window // 2
    around = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in around]
