"""Self-correction for any diffusers pipeline of a supported family, from outside: no subclass, no patched pipeline.

>>> correction = SelfCorrection(pipeline, "adapter/folder", correct=0.02, correction_rule="relative")
>>> pipeline(prompt, callback_on_step_end=correction.callback(prompt)).images[0]

or, for every step from the first on, for pipelines without callbacks, and for the released code's way (mode `noise`):

>>> with correction.hooked(prompt):
...     image = pipeline(prompt).images[0]
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from dpt_t2i.adapter.io import load_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.fingerprint import check_fingerprint, lora_hash
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.loading import backbone_of
from dpt_t2i.backbones.lora import lora_is_disabled, lora_parameters
from dpt_t2i.config import CorrectionConfig, build_config, resolve_key
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.additions import check_additions
from dpt_t2i.sampling.guide import Guide
from dpt_t2i.sampling.loop import check_corrected_part
from dpt_t2i.sampling.offload import check_offload
from dpt_t2i.sampling.pipeline_hooks import DenoiserHook, StateCallback
from dpt_t2i.sampling.schedulers import check_state_sampler
from dpt_t2i.sampling.scoring import MatchScorer

log = logging.getLogger(__name__)


class SelfCorrection:
    """Steps up the gradient of the model's own matching score while a diffusers pipeline samples.

    Args:
        pipeline: of a supported family; its modules are frozen and put into eval mode.
        adapter: folder that `dpt probe` or `dpt tune` wrote, or an adapter in memory, which is frozen too. It knows the
            tap that it reads.
        settings: those of `dpt generate` by the same names: `correct`, `correction_rule`, `correction_mode`,
            `correction_start`, `correction_end`, `correction_every`. Without `correct` what is not given is taken from
            what is stored with the adapter, if anything; all else has the command's defaults.

    Raises:
        InputError: an unsupported pipeline, an adapter of another architecture, an unknown setting, no strength, a
            corrected part of the schedule that ends before it begins, weights that are offloaded by layer, or an
            addition that the score cannot share (`check_additions`).
    """

    def __init__(self, pipeline: Any, adapter: str | PathLike[str] | DiscriminativeAdapter, **settings: Any) -> None:
        self.backbone: Backbone = backbone_of(pipeline)
        self.pipeline = pipeline
        check_offload(self.backbone.denoiser)
        check_additions(self.backbone.denoiser)
        if not isinstance(adapter, DiscriminativeAdapter):
            adapter, _ = load_adapter(Path(adapter), torch.device("cpu"), self.backbone.fingerprint())
        elif adapter.origin is not None:
            check_fingerprint(adapter.origin.base, self.backbone.fingerprint(), "the adapter")
        if adapter.origin is not None:
            _tell_other_lora(adapter.origin.base.get("lora"), self.backbone)
        # A strength means another thing under another rule, so one that is given stands alone.
        given = {resolve_key(CorrectionConfig, key) for key in settings}
        asks = adapter.origin is not None and "correct" not in given
        stored = (adapter.origin.metadata.get("correction") if asks and adapter.origin else None) or {}
        CorrectionConfig.check_rule(stored, settings)
        self.config = build_config(CorrectionConfig, overrides={**stored, **settings})
        _check_settings(self.config)
        self.scorer = MatchScorer.of(self.backbone, adapter.requires_grad_(False))

    def callback(
        self, prompt: str | Sequence[str], height: int | None = None, width: int | None = None
    ) -> StateCallback:
        """For `callback_on_step_end=`: the state is corrected between two steps (mode `state`).

        It fires after a step, so the initial noise is not corrected; `hooked` does that too.

        Args:
            prompt: the text or texts to obey, as the pipeline gets them, each for as many images as the pipeline makes
                of it.
            height, width: pixels of the images, needed only by families whose pipelines pack their latents.

        Raises:
            InputError: mode `noise`, a sampler that would undo the correction, or weights offloaded by layer; and,
                while sampling, a call none of whose steps it would correct.
        """
        if self.config.correction_mode != "state":
            raise InputError("a callback fires between steps and cannot do correction_mode noise; use `hooked(prompt)`")
        return StateCallback(self._guide(prompt, height, width, None))

    @contextmanager
    def hooked(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[DenoiserHook]:
        """Every call of the pipeline inside the `with` is corrected, at every step and in either mode.

        A hook before the denoiser's forward pass corrects its input. In mode `noise` only the conditional branch sees
        that, as in the released code; in mode `state` both do, and the sampler steps from it as well. Nothing is left
        behind when the `with` ends.

        Args:
            prompt: as for `callback`.
            num_images_per_prompt: as the pipeline gets it.
            height, width: as for `callback`.

        Raises:
            InputError: a sampler that would undo a correction in mode `state`, weights offloaded by layer, or another
                `hooked` at work; and, while sampling, a batch of another size than prompts and images say, or a call
                none of whose steps would be corrected.
        """
        texts = 1 if isinstance(prompt, str) else len(prompt)
        guide = self._guide(prompt, height, width, texts * num_images_per_prompt)
        hook = DenoiserHook(guide)
        with hook.installed():
            yield hook

    def _guide(self, prompt: str | Sequence[str], height: int | None, width: int | None, images: int | None) -> Guide:
        check_offload(self.backbone.denoiser)
        check_additions(self.backbone.denoiser)
        if self.config.correction_mode == "state":
            check_state_sampler(self.pipeline.scheduler)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError("self-correction needs at least one prompt to obey")
        scale, sides = self.backbone.vae_scale, self.backbone.image_size
        # Packed latents are pairs of rows and columns: pipelines round down to them.
        step = 1 if self.backbone.pipeline_call.pack is None else 2
        rows, columns = (step * (side // (step * scale)) for side in (height or sides[0], width or sides[1]))
        text = self.backbone.encode_text(prompts)
        return Guide(self.backbone, self.scorer, self.config, text, (rows, columns), images)


def _tell_other_lora(made_with: str | None, backbone: Backbone) -> None:
    """Warn where the adapter read a model with a LoRA and the pipeline has none at work, or another one."""
    if not made_with:
        return
    found, disabled = lora_hash(backbone.denoiser), lora_is_disabled(backbone)
    if found is None or disabled:
        log.warning(
            "the adapter was trained together with a LoRA and the pipeline has %s: its score may mislead; call "
            "`pipeline.%s` first, unless the LoRA is merged into the weights",
            *(("it disabled", "enable_lora") if disabled else ("none", "load_lora_weights")),
        )
    elif found != made_with and all(parameter.dtype == torch.float32 for parameter in lora_parameters(backbone)):
        log.warning(
            "the adapter was trained together with another LoRA (%s) than the pipeline has (%s): its score may "
            "mislead, unless that is its running average, or it with alpha in its weights",
            made_with, found,
        )  # fmt: skip


def _check_settings(config: CorrectionConfig) -> None:
    if config.correct == 0:
        raise InputError(
            "self-correction needs a strength; give `correct`, for instance 0.05 with correction_rule='relative'"
        )
    check_corrected_part(config)
    if config.correction_fused:
        raise InputError("correction_fused is for `dpt generate`; give `correction_fused=False` for a pipeline")
