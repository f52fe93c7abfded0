"""Which ways of keeping a pipeline's weights off the GPU leave them there long enough for a gradient."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpt_t2i.errors import InputError


def check_offload(denoiser: nn.Module) -> None:
    """Refuse sequential and group offloading, which take a layer's weights away right after its forward pass.

    Offloading of whole models keeps the denoiser in place until another model is called, and is fine.

    Raises:
        InputError: naming the kind of offloading and the mend.
    """
    for module in denoiser.modules():
        kind = _kind(module)
        if kind is not None:
            raise InputError(
                f"{kind} offloading takes the denoiser's layers away before self-correction has their gradient; use "
                "pipeline.enable_model_cpu_offload(), or none"
            )


def _kind(module: nn.Module) -> str | None:
    """Read off what accelerate and diffusers leave on a module: `_hf_hook`, and the registry `_diffusers_hook`."""
    hook: Any = getattr(module, "_hf_hook", None)
    parts = getattr(hook, "hooks", (hook,))  # accelerate's SequentialHook holds several
    if any(type(part).__name__ == "AlignDevicesHook" and part.offload for part in parts):
        return "sequential"
    registry: Any = getattr(module, "_diffusers_hook", None)
    return "group" if "group_offloading" in getattr(registry, "hooks", ()) else None
