"""Adapters out of checkpoints of the authors' release (github.com/LgQu/DPT-T2I).

Such a checkpoint holds the adapter, in stage 2 also the LoRA of the U-Net (keys `unet.*`), but neither sizes nor tap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpt_t2i.adapter.io import place_state
from dpt_t2i.adapter.model import DiscriminativeAdapter
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
_REFUSED = {
    "text_encoder": "of a tuned RoBERTa; only checkpoints trained with the frozen one can be imported",
    "fusion_proj": "of an `all-*` feature; only one tap, or several joined with `_`, can be imported",
}
_BOX_LAYER = re.compile(r"bbox_embed\.layers\.(\d)\.(weight|bias)")


@dataclass(frozen=True)
class OfficialKey:
    """What became of one key of the checkpoint."""

    key: str
    action: Literal["taken", "ignored"]
    note: str  # our names (joined by commas), or the reason


def adapter_from_official(
    state: Mapping[str, Tensor],
    tap_channels: Mapping[str, int],
    *,
    num_heads: int = 8,
    num_queries_matching: int = 10,
    grounding_text: str = "roberta-base",
) -> tuple[DiscriminativeAdapter, tuple[OfficialKey, ...]]:
    """Build the adapter that a released checkpoint holds, in eval mode on the CPU, and account for every key.

    Sizes come from the tensors' shapes. What no shape tells must be given: the taps (in the order of the release's
    `--unet_feature`), the number of attention heads and how many of the queries are matching ones; the defaults
    are the release's.

    Raises:
        InputError: a key is unknown or missing, or the taps do not fit the projection.
    """
    placed, table = adapter_state_from_official(state, tap_channels)
    try:
        config = AdapterConfig(
            hidden_dim=placed["queries.weight"].shape[1],
            num_heads=num_heads,
            dim_feedforward=placed["transformer.decoder.0.linear1.weight"].shape[0],
            enc_layers=_count_layers(placed, "encoder"),
            dec_layers=_count_layers(placed, "decoder"),
            num_queries_matching=num_queries_matching,
            num_queries_rec=placed["queries.weight"].shape[0] - num_queries_matching,
            contrastive_dim=placed["grounding.query_align.weight"].shape[0],
            num_token_classes=placed["grounding.token_classifier.weight"].shape[0] - 1,
            normalize_features=False,
            grounding_text=grounding_text,
        )
        pooled_dim = placed["match_head.2.weight"].shape[0]
        text_dim = placed["grounding.token_align.weight"].shape[1]
    except KeyError as error:
        raise InputError(f"not a checkpoint of the DPT release: it has no tensor for `{error.args[0]}`") from error
    with torch.device("meta"):
        adapter = DiscriminativeAdapter(config, tap_channels, pooled_dim, text_dim)
    place_state(adapter, placed, "the released checkpoint")
    return adapter.float().eval(), table


def adapter_state_from_official(
    state: Mapping[str, Tensor], tap_channels: Mapping[str, int]
) -> tuple[dict[str, Tensor], tuple[OfficialKey, ...]]:
    """Rename the tensors of a released checkpoint to ours -> (state, one row for every key, in the file's order).

    The release concatenates the maps of several taps before one projection; ours sums one projection a tap, so that
    weight is cut along its input channels, and the single bias goes to the first tap.

    Raises:
        InputError: a key is neither the adapter's nor the U-Net's LoRA, or the channels do not add up.
    """
    placed: dict[str, Tensor] = {}
    table: list[OfficialKey] = []
    for full_key, tensor in state.items():
        key = full_key.removeprefix("module.")  # left by a wrapper for distributed training
        if key.startswith("unet."):
            table.append(OfficialKey(full_key, "ignored", "LoRA of the denoiser, imported apart from the adapter"))
            continue
        new = _split_projection(key, tensor, tap_channels) if key.startswith("input_proj.") else {_rename(key): tensor}
        placed.update(new)
        table.append(OfficialKey(full_key, "taken", ", ".join(new)))
    return placed, tuple(table)


def _rename(key: str) -> str:
    if box := _BOX_LAYER.fullmatch(key):
        return f"grounding.box.{2 * int(box[1])}.{box[2]}"  # ReLUs sit between our layers
    for pattern, name in _RENAMES:
        if found := re.fullmatch(pattern, key):
            return found.expand(name)
    raise InputError(
        f"released checkpoint: key `{key}` is {_REFUSED.get(key.split('.')[0], 'unknown to the importer')}"
    )


def _split_projection(key: str, tensor: Tensor, tap_channels: Mapping[str, int]) -> dict[str, Tensor]:
    names = [f"projections.{tap}" for tap in tap_channels]
    if key == "input_proj.bias":
        biases = [tensor, *(torch.zeros_like(tensor) for _ in names[1:])]
        return {f"{name}.bias": bias for name, bias in zip(names, biases, strict=True)}
    if tensor.shape[1] != sum(tap_channels.values()):
        raise InputError(
            f"the checkpoint's projection takes {tensor.shape[1]} channels, tap {'_'.join(tap_channels)} gives "
            f"{sum(tap_channels.values())}; name the tap that it was trained with"
        )
    parts = tensor.split(list(tap_channels.values()), dim=1)
    return {f"{name}.weight": part.contiguous() for name, part in zip(names, parts, strict=True)}


def _count_layers(state: Mapping[str, Tensor], part: str) -> int:
    return len({key.split(".")[2] for key in state if key.startswith(f"transformer.{part}.")})
