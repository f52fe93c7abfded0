"""The layer x timestep atlas for eyes: a heat map as SVG in the report and as PNG, and the numbers behind it.

Everything is made of the content of `atlas.json` and of the run's `metrics.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dpt_t2i.files import in_one_move
from dpt_t2i.publish.figures import INK, LINE, MUTED, STYLE, TUNED, to_svg, training_curves
from dpt_t2i.publish.gallery import read_rows
from dpt_t2i.publish.report import as_markup, environment, write_page

# figure -> title, and what guessing gives, where that has a name
SHARES: dict[str, tuple[str, float | None]] = {
    "itm_text": ("matching, text side", 0.5),
    "itm_image": ("matching, image side", 0.5),
    "rec_p1": ("grounding, P@1", None),
}
LOSSES = {"loss_i2t": "text side", "loss_t2i": "image side", "loss_giou": "1 − GIoU of the first box"}
PAPER: dict[Any, str] = {INK: "#1d1f23", MUTED: "#656a73", LINE: "#dedbd5", TUNED: "#2f6fd0"}  # a page in the light
DARKEST = 0.85  # opacity of the best cell, on which ink can still be read


def heat_map(atlas: Mapping[str, Any], color: str) -> Figure:
    """A panel a figure, a row a tap in the order of the pass, a column a bucket, each cell with its percent.

    A cell is the more of `color` the nearer its value is to the panel's highest; the lowest is clear.
    """
    names = [name for name in SHARES if name in atlas["best"]]
    width = max(2.6, 0.42 * len(atlas["buckets"])) * len(names)
    figure = Figure(figsize=(1.2 + width, 1.1 + 0.32 * len(atlas["cells"])), layout="constrained")
    for place, name in enumerate(names):
        _panel(figure.add_subplot(1, len(names), place + 1), atlas, name, color, labelled=place == 0)
    return figure


def heat_map_svg(atlas: Mapping[str, Any]) -> str:
    """The heat map in the colours of a page."""
    with rc_context({**STYLE, "svg.hashsalt": "atlas"}):
        return to_svg(heat_map(atlas, TUNED), "What the adapter at each tap can tell at each timestep")


def write_atlas_picture(path: Path, atlas: Mapping[str, Any]) -> Path:
    """The heat map as a PNG on white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({key: PAPER.get(value, value) for key, value in STYLE.items()}):
        figure = heat_map(atlas, PAPER[TUNED])
        with in_one_move(path) as unfinished:
            figure.savefig(unfinished, dpi=150, facecolor="white", format="png", metadata={"Software": None})
    return path


def write_atlas_report(path: Path, atlas: Mapping[str, Any], metrics: Path | None = None) -> Path:
    """Write a self-contained HTML page. Equal inputs give equal bytes.

    Args:
        atlas: content of `atlas.json`.
        metrics: the run's `metrics.jsonl`, for the curves.
    """
    curves = training_curves("probes", read_rows(metrics)) if metrics is not None else None
    page = (
        environment()
        .get_template("atlas.html.j2")
        .render(
            atlas=atlas,
            timesteps=[str(bucket["middle"]) for bucket in atlas["buckets"]],
            shares={name: SHARES[name] for name in SHARES if name in atlas["best"]},
            losses={name: title for name, title in LOSSES.items() if _is_known(atlas, name)},
            heat_map=as_markup(heat_map_svg(atlas)),
            curves=None if curves is None else as_markup(curves),
            settings=json.dumps(atlas["settings"], indent=2),
        )
    )
    return write_page(path, page)


def _panel(axes: Axes, atlas: Mapping[str, Any], name: str, color: str, labelled: bool) -> None:
    taps = list(atlas["cells"])
    timesteps = [str(bucket["middle"]) for bucket in atlas["buckets"]]
    values = [[atlas["cells"][tap][timestep][name]["accuracy"] for timestep in timesteps] for tap in taps]
    low, high = min(map(min, values)), max(map(max, values))
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            heat = DARKEST * (value - low) / (high - low or 1.0)
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=color, alpha=heat, linewidth=0))
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    axes.set_title(f"{SHARES[name][0]}, %")
    axes.set_xlim(-0.5, len(timesteps) - 0.5)
    axes.set_ylim(len(taps) - 0.5, -0.5)
    axes.set_xticks(range(len(timesteps)), timesteps, fontsize=8)
    axes.set_yticks(range(len(taps)), taps if labelled else [""] * len(taps))
    axes.set_xlabel("timestep")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _is_known(atlas: Mapping[str, Any], name: str) -> bool:
    return any(name in cell for row in atlas["cells"].values() for cell in row.values())
