"""Discriminative probing and tuning (DPT) of text-to-image diffusion models.

>>> model = dpt_t2i.load()
>>> image = model.generate("a red circle left of a blue square", seeds=[0])[0]
>>> model.score(image, "a red circle left of a blue square").score
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpt_t2i.sampling.model import T2IModel
    from dpt_t2i.sampling.self_correction import SelfCorrection

__version__ = "0.1.0"
__all__ = ["SelfCorrection", "load"]


def load(
    base: str = "bundled",
    lora: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
) -> T2IModel:
    """A text-to-image model with what was learned on it; torch is imported here and not before.

    Args:
        base: `bundled`, a diffusers folder, or a hub id.
        lora: LoRA file or folder; None = what ships with the base; `none` = the plain base.
        adapter: adapter folder; None = what ships with the base and fits the LoRA; `none` = none.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: of the frozen weights: float32, bfloat16 or float16.
        revision: git revision of a hub model.

    Raises:
        dpt_t2i.errors.InputError: something is missing, broken, or made for another base.
    """
    from dpt_t2i.sampling.model import load_model

    return load_model(base, lora, adapter, device, dtype, revision)


def __getattr__(name: str) -> Any:
    """`SelfCorrection` on first use: it needs torch and diffusers, and `import dpt_t2i` does not."""
    if name != "SelfCorrection":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dpt_t2i.sampling.self_correction import SelfCorrection

    return SelfCorrection
