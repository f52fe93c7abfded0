"""A held-out figure over records that were trained on is none."""

from __future__ import annotations

from pathlib import Path

from dpt_t2i.adapter.types import AdapterOrigin
from dpt_t2i.config import DataConfig
from dpt_t2i.data.sources import holds_out_tail


def seen_warnings(data: DataConfig, origin: AdapterOrigin | None) -> list[str]:
    """One line where `val_samples` reaches behind the tail that the adapter's own training held out, else none.

    A data set is known by its name alone: an adapter does not keep the folders of the machine where it was made.
    """
    trained = (origin.metadata.get("config") or {}).get("data") if origin is not None else None
    if not trained or Path(str(trained["dataset"])).name != Path(data.dataset).name or not holds_out_tail(data):
        return []
    more = data.val_samples - int(trained["val_samples"])
    if more <= 0:
        return []
    return [
        f"warning: {more} of these {data.val_samples} held-out records are none: the adapter was trained on "
        f"`{trained['dataset']}` with the last {trained['val_samples']} records held out; give --val_samples "
        f"{trained['val_samples']}, or a data set with a held-out part of its own"
    ]
