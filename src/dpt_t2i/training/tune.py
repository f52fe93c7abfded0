"""Stage 2: tuning. A LoRA on the denoiser and the adapter learn together on ITM + REC + denoising.

    dpt tune --adapter runs/probe --output_dir runs/tune

`--objective denoise_only` trains the same LoRA on the denoising loss alone: the control arm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dpt_t2i.backbones.lora import add_lora, load_lora, save_lora
from dpt_t2i.config import TuneConfig
from dpt_t2i.errors import InputError
from dpt_t2i.training.encode import report_cut
from dpt_t2i.training.engine import Job, train
from dpt_t2i.training.objective import DenoiseObjective, TuneObjective, weights_of
from dpt_t2i.training.on_policy import OnPolicy
from dpt_t2i.training.probe import finish, restore_adapter, result
from dpt_t2i.training.setup import Setup, set_up, store_adapter


def run_tune(config: TuneConfig) -> dict[str, Any]:
    """Train LoRA (and adapter); the run folder gets `pytorch_lora_weights.safetensors`, `adapter/`, metrics.

    Raises:
        InputError: bad input, no adapter to start from, or a loss that is not finite.
    """
    discriminative = config.objective == "dpt"
    if discriminative and config.model.adapter in (None, "none"):
        raise InputError("`dpt tune` starts from stage 1: give --adapter RUN/adapter of a `dpt probe` run")
    setup = set_up(config)
    _put_lora(config, setup)
    objective: nn.Module
    if discriminative:
        objective = TuneObjective(setup.backbone, setup.adapter, setup.taps, config.loss, config.denoise)
    else:
        objective = DenoiseObjective(setup.backbone, config.denoise)

    def save(folder: Path) -> None:
        settings = config.model_dump(mode="json")
        save_lora(setup.backbone, folder, settings)
        if discriminative:
            store_adapter(setup, folder / "adapter", stage="tune", config=settings)

    def load(folder: Path) -> None:
        if discriminative:
            restore_adapter(setup, folder)
        load_lora(setup.backbone, folder, trainable=True)

    def validate() -> dict[str, float]:
        found = setup.validation() if discriminative else {}
        return found | setup.validation.denoising(config.denoise)

    figures = train(
        Job(
            objective=objective,
            weights=weights_of(config.loss, config.denoise),
            encoder=setup.encoder,
            examples=setup.examples,
            train=config.train,
            data=config.data,
            caption_dropout=config.denoise.caption_dropout,
            seed=config.seed,
            output_dir=config.folder,
            save_artifacts=save,
            load_artifacts=load,
            validate=validate,
            after_step=setup.adapter.clamp_logit_scale,
            refresh=OnPolicy.of(config.loss, setup.backbone, setup.examples, config.seed) if discriminative else None,
        ),
        setup.accelerator,
    )
    if setup.accelerator.is_main_process:
        save(config.folder)
    report_cut(setup.encoder, config.folder)
    finish(setup)
    return result(config.folder, figures)


def _put_lora(config: TuneConfig, setup: Setup) -> None:
    """A fresh LoRA, or the one to go on from; nothing else of the denoiser is trained."""
    setup.backbone.denoiser.requires_grad_(False)
    if config.model.lora not in (None, "none"):
        load_lora(setup.backbone, Path(str(config.model.lora)), trainable=True)
    else:
        add_lora(setup.backbone, config.lora.rank, config.lora.lora_alpha, config.lora.lora_scope, setup.taps)
