"""What people add to a pipeline's denoiser that a pass of the matching score cannot share."""

from __future__ import annotations

from torch import nn

from dpt_t2i.errors import InputError


def check_additions(denoiser: nn.Module) -> None:
    """Refuse what would fail deep inside a corrected step, or share its memory with the score's own pass.

    Raises:
        InputError: an IP-Adapter whose images the score's pass is not given, weights stored in fewer bits than they are
            used in, or a cache of earlier steps; names it and the mend.
    """
    if getattr(denoiser, "encoder_hid_proj", None) is not None:
        raise InputError(
            "the denoiser has an IP-Adapter, whose image the matching score does not know; call "
            "`pipeline.unload_ip_adapter()`, or leave self-correction out"
        )
    if getattr(denoiser, "is_cache_enabled", False):
        raise InputError(
            "the denoiser keeps a cache of earlier steps, which self-correction would disturb; call `disable_cache()`"
        )
    if any("layerwise_casting" in getattr(registry, "hooks", ()) for registry in _registries(denoiser)):
        raise InputError(
            "the denoiser's weights are stored in other bits than they are used in (layerwise casting), which has no "
            "gradient; load it in one dtype"
        )


def _registries(module: nn.Module) -> list[object]:
    """What diffusers hooks leave on its parts."""
    found = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return [registry for registry in found if registry is not None]
