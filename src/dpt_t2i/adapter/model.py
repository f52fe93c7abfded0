"""The discriminative adapter: from feature maps of the denoiser to a matching score's vectors and grounded boxes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from dpt_t2i.adapter.encodings import TimestepEncoding, sine_positions
from dpt_t2i.adapter.heads import GroundingHeads, mlp
from dpt_t2i.adapter.transformer import Transformer
from dpt_t2i.adapter.types import AdapterOrigin, AdapterOutput
from dpt_t2i.backbones.types import Features
from dpt_t2i.config import AdapterConfig
from dpt_t2i.errors import InputError

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100.0)  # as CLIP: beyond it the softmax is one-hot and the gradient dies


class DiscriminativeAdapter(nn.Module, PyTorchModelHubMixin, library_name="dpt-t2i", tags=["dpt-t2i"]):
    """Reads the maps of one or several taps with matching and grounding queries (DETR-style, post-norm).

    Each map has its own 1x1 projection to width d; several are brought to the largest one's size and summed, which is
    what one projection of their concatenation would give. With `fusion_channels` and `fusion_size` it is the release's
    `all-<channels>-<size>` instead: maps projected to that width, at that size, summed, and the sum projected to d.
    With `max_map_size` a larger map is first averaged down to so many places a side.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are huggingface_hub's; the files are those of `adapter.io`.

    Args:
        config: sizes. `hidden_dim` must be a multiple of 4 and of `num_heads`.
        tap_channels: tap name -> channels C of its map; the order is kept in the saved file.
        pooled_dim: width P of the pooled text vector.
        text_dim: width of the token states given for grounding.

    Raises:
        InputError: no tap, or sizes that do not divide.
    """

    origin: AdapterOrigin | None = None  # set where an adapter is read or written
    own_text: Path | None = None  # folder of a caption encoder that lies inside the adapter's own

    def __init__(self, config: AdapterConfig, tap_channels: Mapping[str, int], pooled_dim: int, text_dim: int) -> None:
        super().__init__()
        _check_sizes(config, tap_channels)
        dim = config.hidden_dim
        self.config = config
        self.tap_channels = dict(tap_channels)
        self.pooled_dim = pooled_dim
        self.text_dim = text_dim
        self.feature_norms = nn.ModuleDict(
            {module_name(tap): _feature_norm(channels, config) for tap, channels in tap_channels.items()}
        )
        self.projections = _projections(config, tap_channels)
        self.fusion_projection: nn.Module = nn.Identity()
        if config.fusion_channels is not None:
            self.fusion_projection = nn.Conv2d(config.fusion_channels, dim, kernel_size=1)
        self.timestep_encoding = TimestepEncoding(dim)
        self.queries = nn.Embedding(config.num_queries_matching + config.num_queries_rec, dim)  # matching ones first
        self.transformer = Transformer(
            dim, config.num_heads, config.dim_feedforward, config.enc_layers, config.dec_layers, config.dropout
        )
        self.match_head = mlp(dim, dim, pooled_dim)
        self.grounding = GroundingHeads(dim, config.num_token_classes, config.contrastive_dim, text_dim)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    def forward(
        self, features: Features, text_tokens: Tensor | None = None, text_mask: Tensor | None = None
    ) -> AdapterOutput:
        """Read B noised images.

        Args:
            features: maps of (at least) the adapter's taps, and the timesteps, which may be fractional.
            text_tokens: `[B, L, text_dim]` token states of the grounding expression; needed by the alignment loss only.
            text_mask: `[B, L]` bool, True on real tokens; None counts padding too, as the release does.

        Raises:
            InputError: a tap is missing from `features` or has another number of channels.
        """
        states = self._read(features)
        matching = states[:, : self.config.num_queries_matching]
        rec = states[:, self.config.num_queries_matching :]
        return AdapterOutput(
            match_embeds=self.match_head(matching),
            logits=self.grounding.logits(rec),
            boxes=self.grounding.boxes(rec),
            query_align=self.grounding.align_queries(rec),
            token_align=None if text_tokens is None else self.grounding.align_tokens(text_tokens),
            logit_scale=self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(),
            token_mask=text_mask,
        )

    def match_embeds(self, features: Features) -> Tensor:
        """`forward(features).match_embeds` and nothing else, `[B, Q_m, P]`: what a step of self-correction needs.

        The grounding queries are attended to, as ever, but neither worked out nor given to their heads.
        """
        embeds: Tensor = self.match_head(self._read(features, self.config.num_queries_matching))
        return embeds

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """To be called after an optimiser step, as CLIP does: beyond the limit the forward's clamp has no gradient."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    @property
    def tap_text(self) -> str:
        """Its taps as a config names them."""
        return tap_text(self.tap_channels, self.config.fusion_channels, self.config.fusion_size)

    def _save_pretrained(self, save_directory: Path) -> None:
        """What `save_pretrained` and `push_to_hub` write: an adapter folder, see `adapter.io`.

        Raises:
            InputError: the adapter is fresh, so that nothing is known of its base.
        """
        from dpt_t2i.adapter.io import save_adapter  # builds adapters, so it imports this file

        if self.origin is None:
            raise InputError("this adapter does not know its base; write it with `save_adapter`, which is told")
        save_adapter(self, save_directory, base_fingerprint=self.origin.base, metadata=self.origin.metadata)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        **described: Any,  # what the mixin read in config.json; `load_adapter` reads and checks it itself
    ) -> DiscriminativeAdapter:
        """What `from_pretrained` gives: the adapter of a folder or hub id, in eval mode."""
        from dpt_t2i.adapter.io import download_adapter, load_adapter

        how = {"cache_dir": cache_dir, "force_download": force_download, "token": token}
        folder = Path(model_id)
        if not folder.is_dir():
            folder = download_adapter(model_id, revision, local_files_only=local_files_only, **how)
        return load_adapter(folder, torch.device(map_location))[0]

    def _read(self, features: Features, read: int | None = None) -> Tensor:
        """States of the first `read` queries (None = all), `[B, Q, d]`."""
        source = self._fuse(features)  # [B, d, h, w]
        height, width = source.shape[-2:]
        source = source.flatten(2).transpose(1, 2)  # [B, h * w, d]
        positions = sine_positions(height, width, self.config.hidden_dim, source.device).to(source.dtype)
        positions = positions + self.timestep_encoding(features.timesteps.to(source.device))[:, None]
        if self.config.position_values:
            source = source + positions  # else attention can look at a place, but what it reads says not where it is
        states: Tensor = self.transformer(source, positions, self.queries.weight, read)
        return states

    def _fuse(self, features: Features) -> Tensor:
        """Normalise, project and sum the taps' maps -> `[B, d, h, w]` of the largest map, or of `fusion_size`."""
        projected: list[Tensor] = []
        for tap, channels in self.tap_channels.items():
            feature_map = features.maps.get(tap)
            if feature_map is None or feature_map.shape[1] != channels:
                got = "no such map" if feature_map is None else f"{feature_map.shape[1]} channels"
                raise InputError(f"the adapter reads tap `{tap}` with {channels} channels, but got {got}")
            projection = self.projections[module_name(tap)]
            averaged = _averaged(feature_map.to(self.queries.weight.dtype), self.config.max_map_size)
            normed = self.feature_norms[module_name(tap)](averaged)
            projected.append(projection(normed))
        # A 1x1 projection and an interpolation commute: projecting first interpolates the fewer channels.
        fused: Tensor = self.fusion_projection(torch.stack(_of_one_size(projected, self.config.fusion_size)).sum(dim=0))
        return fused


def tap_text(names: Iterable[str], fusion_channels: int | None, fusion_size: int | None) -> str:
    """The inverse of `parse_taps` and `parse_fusion`: `bottom0_up1`, or `bottom0_up1-40-12` where fused."""
    return "_".join(names) + (f"-{fusion_channels}-{fusion_size}" if fusion_size else "")


def _averaged(feature_map: Tensor, most: int | None) -> Tensor:
    """The map at no more than `most` places a side: means of equal parts, or nearly so."""
    height, width = feature_map.shape[-2:]
    if most is None or max(height, width) <= most:
        return feature_map
    return F.adaptive_avg_pool2d(feature_map, (min(height, most), min(width, most)))


def _of_one_size(maps: Sequence[Tensor], side: int | None) -> list[Tensor]:
    """All maps at the size of the largest, bilinear; or at `side` x `side`, nearest, as the release's fusion."""
    if side is not None:
        return [F.interpolate(one, size=(side, side)) for one in maps]
    size = max((tuple(one.shape[-2:]) for one in maps), key=math.prod)
    return [
        one if one.shape[-2:] == size else F.interpolate(one, size=size, mode="bilinear", align_corners=False)
        for one in maps
    ]


def _projections(config: AdapterConfig, tap_channels: Mapping[str, int]) -> nn.ModuleDict:
    """A 1x1 convolution a tap. Summed to width d they share one bias, the first one's, like a single projection."""
    width = config.fusion_channels or config.hidden_dim
    return nn.ModuleDict(
        {
            module_name(tap): nn.Conv2d(channels, width, 1, bias=index == 0 or config.fusion_channels is not None)
            for index, (tap, channels) in enumerate(tap_channels.items())
        }
    )


def _feature_norm(channels: int, config: AdapterConfig) -> nn.Module:
    """Unit scale for a whole map, which keeps the contrast between its places; the release has nothing here."""
    return nn.GroupNorm(1, channels) if config.normalize_features else nn.Identity()


def module_name(tap: str) -> str:
    """A name for what belongs to the tap in a ModuleDict."""
    return tap.replace(".", "-")  # a tap may be a dotted path, which a submodule's name may not


def _check_sizes(config: AdapterConfig, tap_channels: Mapping[str, int]) -> None:
    if not tap_channels:
        raise InputError("the adapter needs at least one tap; set `tap`, e.g. to `up1`")
    if config.hidden_dim % 4 or config.hidden_dim % config.num_heads:
        raise InputError(
            f"hidden_dim {config.hidden_dim} must be a multiple of 4 and of num_heads ({config.num_heads})"
        )
    if (config.fusion_channels is None) != (config.fusion_size is None):
        raise InputError("fusion_channels and fusion_size belong together; set tap to `all-<channels>-<size>` instead")
