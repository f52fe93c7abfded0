"""An adapter on disk: a folder with `model.safetensors`, and `config.json` that says what it is and what it fits."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.types import AdapterOrigin
from dpt_t2i.backbones.fingerprint import check_fingerprint
from dpt_t2i.config import AdapterConfig
from dpt_t2i.errors import InputError
from dpt_t2i.files import in_one_move
from dpt_t2i.versions import told

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT_VERSION = 1
OWN_GROUNDING_TEXT = "./grounding_text"  # `adapter.grounding_text` of an adapter that carries its own encoder
PATTERNS = [WEIGHTS, CONFIG, "grounding_text/*", "adapter/*"]  # of an adapter's files on the hub, also of an export


def save_adapter(
    adapter: DiscriminativeAdapter,
    folder: Path,
    *,
    base_fingerprint: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter so that `load_adapter` needs nothing else.

    Args:
        adapter: trained or not. A caption encoder of its own, which it was loaded with, goes along.
        folder: made if missing; an adapter already there is replaced, each file in one move.
        base_fingerprint: of the T2I model it was trained on, as `Backbone.fingerprint()` gives it (architecture with
            widths and prediction type, name, hashes of the weights), with `lora`, the hash of the LoRA that the model
            had then, None without one.
        metadata: anything JSON that should travel along, such as the best correction strength.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = adapter.config.model_dump(mode="json")
    if adapter.own_text is not None and described["grounding_text"] == str(adapter.own_text):
        _carry(adapter.own_text, folder / OWN_GROUNDING_TEXT)
        described["grounding_text"] = OWN_GROUNDING_TEXT
    adapter.origin = AdapterOrigin(dict(base_fingerprint), dict(metadata or {}))
    card = {
        "format_version": FORMAT_VERSION,
        "adapter": described,
        "tap_channels": adapter.tap_channels,
        "pooled_dim": adapter.pooled_dim,
        "text_dim": adapter.text_dim,
        "base": adapter.origin.base,
        "versions": {"dpt_t2i": told("dpt-t2i")["dpt-t2i"], "torch": torch.__version__},
        "metadata": adapter.origin.metadata,
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    with in_one_move(folder / CONFIG) as config_file, in_one_move(folder / WEIGHTS) as weights_file:
        save_file(state, weights_file, metadata={"format": "pt"})
        config_file.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_adapter(
    folder: Path, device: torch.device, expected_fingerprint: Mapping[str, Any] | None = None
) -> tuple[DiscriminativeAdapter, dict[str, Any]]:
    """Read an adapter, in eval mode and float32, and the metadata saved with it. A run folder stands for its adapter.

    Loading draws no random number. `expected_fingerprint` is that of the T2I model the adapter is to judge; other
    weights of the same architecture, or another LoRA (entry `lora`), earn a warning that names both; None skips the
    comparison.

    Raises:
        InputError: a file is missing or damaged, a tensor is missing, surplus or of the wrong shape, or the adapter
            was made for another architecture.
    """
    folder = adapter_folder(folder)
    card = read_adapter_card(folder)
    if expected_fingerprint is not None:
        check_fingerprint(card["base"], expected_fingerprint, f"adapter {folder}")
    try:
        with torch.device("meta"):
            adapter = DiscriminativeAdapter(
                AdapterConfig.model_validate(card["adapter"]),
                card["tap_channels"],
                card["pooled_dim"],
                card["text_dim"],
            )
    except ValidationError as error:
        first = error.errors()[0]
        key, surplus = ".".join(map(str, first["loc"])), first["type"] == "extra_forbidden"
        mend = "it is of a newer version: upgrade dpt-t2i" if surplus else "export the adapter again"
        raise InputError(f"{folder / CONFIG}: `adapter.{key}`: {first['msg']}; {mend}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / CONFIG} is damaged: {str(error).splitlines()[0]}; export the adapter again"
        ) from error
    place_state(adapter, _read_weights(folder / WEIGHTS), str(folder / WEIGHTS))
    adapter.origin = AdapterOrigin(card["base"], card["metadata"])
    own = (folder / OWN_GROUNDING_TEXT).resolve()
    adapter.own_text = own if card["adapter"]["grounding_text"] == str(own) else None
    return adapter.float().to(device).eval(), card["metadata"]


def adapter_folder(path: Path) -> Path:
    """The adapter's own folder, where the run folder or checkpoint that holds it is given."""
    inner = Path(path) / "adapter"
    return inner if not (Path(path) / CONFIG).is_file() and (inner / CONFIG).is_file() else Path(path)


def read_adapter_card(folder: Path) -> dict[str, Any]:
    """Everything of `config.json`: adapter, tap_channels, pooled_dim, text_dim, base, versions, metadata.

    A grounding encoder that lies inside the folder is named by its full path.

    Raises:
        InputError: no adapter there, not JSON, an entry missing, or a newer format.
    """
    path = adapter_folder(folder) / CONFIG
    if not path.is_file():
        mend = "give the folder that `dpt probe` wrote"
        if taps := sorted(part.parent.name for part in Path(folder).glob(f"adapters/*/{CONFIG}")):
            mend = f"it has one for each tap ({', '.join(taps)}): give {Path(folder) / 'adapters' / taps[0]}"
        if Path(folder).suffix == ".bin" or any(Path(folder).glob("pytorch_model*.bin")):
            mend = "the release's checkpoint? `dpt import-official` makes an adapter of it"
        raise InputError(f"no adapter in {folder}: {CONFIG} is missing; {mend}")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}; export the adapter again") from error
    needed = ("format_version", "adapter", "tap_channels", "pooled_dim", "text_dim", "base", "metadata")
    missing = [key for key in needed if not isinstance(card, dict) or key not in card]
    if missing:
        raise InputError(f"{path} is not an adapter's config: `{missing[0]}` is missing")
    for key in ("adapter", "tap_channels", "base", "metadata"):
        if not isinstance(card[key], dict):
            raise InputError(f"{path} is damaged: `{key}` is no object; export the adapter again")
    if card["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path} has format {card['format_version']}, this version reads {FORMAT_VERSION}; upgrade dpt-t2i"
        )
    if isinstance(card["adapter"], dict) and card["adapter"].get("grounding_text") == OWN_GROUNDING_TEXT:
        card["adapter"]["grounding_text"] = str((path.parent / OWN_GROUNDING_TEXT).resolve())
    return dict(card)


def download_adapter(name: str, revision: str | None = None, **how: Any) -> Path:
    """The folder of an adapter on the hub, fetched into the hub's cache; `how` is `snapshot_download`'s.

    Raises:
        InputError: no such adapter, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS, **how))
    except Exception as error:  # the hub's client raises some twenty kinds: offline, no such model, gated, ...
        reason = textwrap.shorten(str(error), 160)
        raise InputError(
            f"adapter {name} is neither a folder nor could it be fetched from the hub: {reason}"
        ) from error


def place_state(adapter: DiscriminativeAdapter, state: Mapping[str, Tensor], source: str) -> None:
    """Give the adapter (whose tensors may be on the meta device) exactly the tensors of `state`.

    Raises:
        InputError: naming `source` and the first key that is missing, surplus or of the wrong shape.
    """
    wanted = adapter.state_dict()
    missing, surplus = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing:
        raise InputError(f"{source} lacks the tensor `{missing[0]}`; is it an adapter of these sizes?")
    if surplus:
        raise InputError(f"{source} holds an unexpected tensor `{surplus[0]}`; is it an adapter of these sizes?")
    for key, tensor in wanted.items():
        if state[key].shape != tensor.shape:
            raise InputError(
                f"{source}: tensor `{key}` has shape {tuple(state[key].shape)}, its config says {tuple(tensor.shape)}"
            )
    adapter.load_state_dict(dict(state), assign=True)


def _carry(source: Path, target: Path) -> None:
    """A folder's files, which nobody edits, once more elsewhere: as links where the disk has them."""
    if source.resolve() == target.resolve():
        return
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        copy = target / file.name
        copy.unlink(missing_ok=True)
        try:
            os.link(file.resolve(), copy)
        except OSError:  # another disk, or one without links
            shutil.copy2(file, copy)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"no adapter in {path.parent}: {path.name} is missing; give the folder that `dpt probe` wrote")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); copy or export it again") from error
