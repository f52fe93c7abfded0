"""Adapters out of checkpoints of the authors' release (github.com/LgQu/DPT-T2I).

Such a checkpoint holds what was trained: the adapter, in stage 2 also the LoRA of the U-Net (keys `unet.*`), and where
it was not frozen the RoBERTa of grounding (`text_encoder.*`); but neither sizes nor tap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpt_t2i.adapter.io import place_state
from dpt_t2i.adapter.model import INITIAL_LOGIT_SCALE, DiscriminativeAdapter, module_name
from dpt_t2i.config import AdapterConfig
from dpt_t2i.errors import InputError

# Released name -> ours, tried in order; names inside the transformer's layers are the same.
_RENAMES = (
    (r"logit_scale", "logit_scale"),
    (r"query_embed\.weight", "queries.weight"),
    (r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(.+)", r"transformer.\1.\2.\3"),
    (r"transformer\.decoder\.norm\.(weight|bias)", r"transformer.norm.\1"),
    (r"timestep_embedding\.time_embedding\.linear_1\.(weight|bias)", r"timestep_encoding.linear_in.\1"),
    (r"timestep_embedding\.time_embedding\.linear_2\.(weight|bias)", r"timestep_encoding.linear_out.\1"),
    (r"map_to_clip\.(\d)\.(weight|bias)", r"match_head.\1.\2"),
    (r"class_embed\.(weight|bias)", r"grounding.token_classifier.\1"),
    (r"contrastive_align_projection_image\.(weight|bias)", r"grounding.query_align.\1"),
    (r"contrastive_align_projection_text\.(weight|bias)", r"grounding.token_align.\1"),
)
_REFUSED = (
    ("transformer.encoder.norm.", "of a pre-norm transformer; only the default, post-norm, can be imported"),
    ("position_embedding.", "of learned positions; only the default, sine, can be imported"),
    ("unet.", "of the denoiser but no attention LoRA; only LoRA can be imported"),
)
_BOX_LAYER = re.compile(r"bbox_embed\.layers\.(\d)\.(weight|bias)")
_LORA = re.compile(r"unet\..+\.processor\.to_(?:q|k|v|out)_lora\.(?:down|up)\.weight")
_GROUNDING_TEXT = "text_encoder."
_BUFFERS = ("text_encoder.embeddings.position_ids", "text_encoder.embeddings.token_type_ids")  # counted, not learned


ALIGNMENT = tuple(
    f"contrastive_align_projection_{what}.{part}" for what in ("image", "text") for part in ("weight", "bias")
)
ROBERTA_WIDTH = 768


@dataclass(frozen=True)
class OfficialKey:
    """What became of one key of the checkpoint, or what a whole checkpoint would hold and this one does not."""

    key: str
    action: Literal["taken", "ignored", "missing"]
    note: str  # our names (joined by commas), or the reason


@dataclass(frozen=True)
class OfficialParts:
    """A checkpoint's tensors by what they belong to, under the release's names without a wrapper's `module.`."""

    adapter: dict[str, Tensor]
    lora: dict[str, Tensor]  # keys `unet....processor.to_q_lora.down.weight`
    grounding_text: dict[str, Tensor]  # names as in transformers' RobertaModel; empty where it was frozen
    buffers: tuple[str, ...]  # keys that hold nothing learned


def sort_official(state: Mapping[str, Tensor]) -> OfficialParts:
    """Tell adapter, LoRA and RoBERTa apart.

    Raises:
        InputError: a key comes twice (with and without a wrapper's prefix).
    """
    parts = OfficialParts({}, {}, {}, tuple(key for key in state if key.removeprefix("module.") in _BUFFERS))
    seen: set[str] = set()
    for full_key, tensor in state.items():
        key = full_key.removeprefix("module.")  # left by a wrapper for distributed training
        if key in seen:
            raise InputError(f"released checkpoint: key `{key}` comes twice, with and without `module.`")
        seen.add(key)
        if key in _BUFFERS:
            continue
        if key.startswith(_GROUNDING_TEXT):
            parts.grounding_text[key.removeprefix(_GROUNDING_TEXT)] = tensor
        else:
            (parts.lora if _LORA.fullmatch(key) else parts.adapter)[key] = tensor
    return parts


def adapter_from_official(
    state: Mapping[str, Tensor],
    tap_channels: Mapping[str, int],
    *,
    fusion: tuple[int, int] | None = None,
    num_heads: int = 8,
    num_queries_matching: int = 10,
    grounding_text: str = "roberta-base",
    text_dim: int = ROBERTA_WIDTH,
) -> tuple[DiscriminativeAdapter, tuple[OfficialKey, ...]]:
    """Build the adapter that a released checkpoint holds, in eval mode on the CPU, and account for each of its keys.

    Sizes come from the tensors' shapes. What no shape tells must be given: the taps (in the order of the release's
    `--unet_feature`), the number of attention heads and how many of the queries are matching ones; the defaults
    are the release's.

    Args:
        state: the adapter's part of a checkpoint (`OfficialParts.adapter`).
        fusion: (channels, side) of the release's `all-<channels>-<side>`; `tap_channels` are then all taps.
        text_dim: width of the caption encoder's states, looked at where the checkpoint knows no alignment: with
            `--no_contrastive_align_loss` the release makes neither of its projections. They start afresh then.

    Raises:
        InputError: a key is unknown or missing, a shape does not fit the others, or the taps do not fit the projection.
    """
    others = (key for key in state if key.startswith(("module.", _GROUNDING_TEXT)) or _LORA.fullmatch(key))
    if whole := next(others, None):
        raise InputError(
            f"`{whole}` is none of the adapter's; give `sort_official(state).adapter` of a whole checkpoint"
        )
    fused = state.get("fusion_proj.0.weight")
    if fusion is None and fused is not None:
        raise InputError(f"the checkpoint was trained on a fused feature; name it: --tap all-{fused.shape[0]}-<size>")
    placed, table = adapter_state_from_official(state, tap_channels, fusion)
    if fresh := _fresh_alignment(placed, text_dim):
        placed |= fresh
        why = "trained without the alignment loss: starts afresh"
        table += tuple(OfficialKey(key, "missing", why) for key in ALIGNMENT)
    if "logit_scale" not in placed:
        placed["logit_scale"] = torch.tensor(INITIAL_LOGIT_SCALE)
        table += (OfficialKey("logit_scale", "missing", "no score reads it: starts at 1 / 0.07, as the release's"),)
    config = AdapterConfig(
        hidden_dim=_size(placed, "queries.weight", 1),
        num_heads=num_heads,
        dim_feedforward=_size(placed, "transformer.decoder.0.linear1.weight", 0),
        enc_layers=_count_layers(placed, "encoder"),
        dec_layers=_count_layers(placed, "decoder"),
        num_queries_matching=num_queries_matching,
        num_queries_rec=_grounding_queries(placed, num_queries_matching),
        contrastive_dim=_size(placed, "grounding.query_align.weight", 0),
        num_token_classes=_size(placed, "grounding.token_classifier.weight", 0) - 1,
        normalize_features=False,
        fusion_channels=fusion[0] if fusion else None,
        fusion_size=fusion[1] if fusion else None,
        grounding_text=grounding_text,
    )
    widths = _size(placed, "match_head.2.weight", 0), _size(placed, "grounding.token_align.weight", 1)
    with torch.device("meta"):
        adapter = DiscriminativeAdapter(config, tap_channels, *widths)
    _check_shapes(adapter.state_dict(), placed, table)
    place_state(adapter, placed, "the released checkpoint")
    return adapter.float().eval(), table


def adapter_state_from_official(
    state: Mapping[str, Tensor], tap_channels: Mapping[str, int], fusion: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], tuple[OfficialKey, ...]]:
    """Rename the adapter's tensors to ours -> (state, one row for every key, in the file's order).

    The release concatenates the maps of several taps before one projection; ours sums one projection a tap, so that
    weight is cut along its input channels, and the single bias goes to the first tap.

    Raises:
        InputError: a key is not the adapter's, or the channels do not add up.
    """
    placed: dict[str, Tensor] = {}
    table: list[OfficialKey] = []
    for key, tensor in state.items():
        new = _place(key, tensor, tap_channels, fusion)
        placed.update(new)
        table.append(OfficialKey(key, "taken", ", ".join(new)))
    return placed, tuple(table)


def _place(
    key: str, tensor: Tensor, tap_channels: Mapping[str, int], fusion: tuple[int, int] | None
) -> dict[str, Tensor]:
    names = [f"projections.{module_name(tap)}" for tap in tap_channels]
    if found := re.fullmatch(r"fusion_proj\.(\d+)\.(weight|bias)", key):
        if fusion is None:
            raise InputError(f"released checkpoint: `{key}` is of a fused feature; name it: --tap all-CHANNELS-SIZE")
        if int(found[1]) >= len(names):
            raise InputError(f"released checkpoint: `{key}` is of one map more than the {len(names)} of the base")
        return {f"{names[int(found[1])]}.{found[2]}": tensor}
    if not key.startswith("input_proj."):
        return {_rename(key): tensor}
    if fusion is not None:
        return {key.replace("input_proj.", "fusion_projection."): tensor}
    if key == "input_proj.bias":
        return {f"{names[0]}.bias": tensor}
    return _split_projection(tensor, tap_channels, names)


def _split_projection(tensor: Tensor, tap_channels: Mapping[str, int], names: Sequence[str]) -> dict[str, Tensor]:
    if tensor.ndim != 4 or tensor.shape[1] != sum(tap_channels.values()):
        width = tensor.shape[1] if tensor.ndim == 4 else tuple(tensor.shape)
        raise InputError(
            f"the checkpoint's projection takes {width} channels, tap {'_'.join(tap_channels)} gives "
            f"{sum(tap_channels.values())}; name the tap that it was trained with"
        )
    parts = tensor.split(list(tap_channels.values()), dim=1)
    return {f"{name}.weight": part.contiguous() for name, part in zip(names, parts, strict=True)}


def _rename(key: str) -> str:
    if box := _BOX_LAYER.fullmatch(key):
        return f"grounding.box.{2 * int(box[1])}.{box[2]}"  # ReLUs sit between our layers
    for pattern, name in _RENAMES:
        if found := re.fullmatch(pattern, key):
            return found.expand(name)
    reason = next((why for prefix, why in _REFUSED if key.startswith(prefix)), "unknown to the importer")
    raise InputError(f"released checkpoint: key `{key}` is {reason}")


def _fresh_alignment(placed: Mapping[str, Tensor], text_dim: int) -> dict[str, Tensor]:
    """Both projections of the alignment, of the sizes that the release gives them; nothing where one is there."""
    ours = [_rename(key) for key in ALIGNMENT]
    queries = placed.get("queries.weight")
    if queries is None or queries.ndim != 2 or any(name in placed for name in ours):
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(width, AdapterConfig().contrastive_dim) for width in (queries.shape[1], text_dim)]
    return dict(zip(ours, [tensor.detach() for layer in layers for tensor in layer.parameters()], strict=True))


def _size(placed: Mapping[str, Tensor], name: str, dim: int) -> int:
    if name not in placed:
        raise InputError(f"not a checkpoint of the DPT release: it has no tensor for `{name}`")
    if dim >= placed[name].ndim:
        raise InputError(f"released checkpoint: the tensor for `{name}` has shape {tuple(placed[name].shape)}")
    return placed[name].shape[dim]


def _grounding_queries(placed: Mapping[str, Tensor], matching: int) -> int:
    total = _size(placed, "queries.weight", 0)
    if matching >= total:
        raise InputError(f"num_queries_matching {matching} leaves none of the checkpoint's {total} queries to ground")
    return total - matching


def _check_shapes(wanted: Mapping[str, Tensor], placed: Mapping[str, Tensor], table: Sequence[OfficialKey]) -> None:
    """Name a tensor whose shape contradicts the others', under the release's own key."""
    for row in table:
        for name in row.note.split(", "):
            if name in wanted and placed[name].shape != wanted[name].shape:
                raise InputError(
                    f"released checkpoint: `{row.key}` has shape {tuple(placed[name].shape)}, the others ask for "
                    f"{tuple(wanted[name].shape)}"
                )


def _count_layers(state: Mapping[str, Tensor], part: str) -> int:
    return len({key.split(".")[2] for key in state if key.startswith(f"transformer.{part}.")})
