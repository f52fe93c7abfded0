"""A metric that shares its encoder with the miner of the negatives rewards, or punishes, its own taste."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dpt_t2i.data.mine import read_miner


def miner_warnings(dataset: Path, metric: Mapping[str, str], what: str) -> list[str]:
    """One line where the data set's negatives were mined with an encoder that the metric uses, else none.

    Args:
        dataset: imagefolder, or its parent with `val/`; anything else was not mined.
        metric: part -> hash of its weights (`fingerprint.weights_hash`), of all encoders in the metric.
        what: the metric, for people.
    """
    headers = [read_miner(folder) for folder in (dataset, dataset / "val") if folder.is_dir()]
    lines = []
    for header in filter(None, headers):
        shared = sorted(part for part, digest in metric.items() if digest in header["fingerprint"].values())
        if shared:
            lines.append(
                f"warning: the hard negatives were mined with `{header['encoder']}`, whose {', '.join(shared)} the "
                f"{what} uses too: these figures are not comparable with those on other negatives"
            )
    return lines
