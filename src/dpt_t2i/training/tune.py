"""Stage 2: tuning. A LoRA on the denoiser and the adapter learn together on ITM + REC + denoising.

    dpt tune --adapter runs/probe --output_dir runs/tune

`--objective denoise_only` trains the same LoRA on the denoising loss alone: the control arm. `--objective denoise_itm`
is between the two: matching or preference by the denoising error, and no adapter.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from dpt_t2i.backbones.lora import add_lora, load_lora, lora_scopes, lora_sizes, save_lora
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import LoraSettings, Section, TuneConfig
from dpt_t2i.errors import InputError
from dpt_t2i.training import ema
from dpt_t2i.training.distill import Teacher
from dpt_t2i.training.ema import LoraAverage
from dpt_t2i.training.encode import report_cut
from dpt_t2i.training.engine import train
from dpt_t2i.training.job import Job
from dpt_t2i.training.objective import DenoiseObjective, TuneObjective, weights_of
from dpt_t2i.training.on_policy import OnPolicy
from dpt_t2i.training.probe import finish, restore_adapter, result
from dpt_t2i.training.samples import Samples
from dpt_t2i.training.setup import Setup, set_up, store_adapter, write_config
from dpt_t2i.training.sharding import sharding_asked
from dpt_t2i.training.windows import Feed

log = logging.getLogger(__name__)


def run_tune(config: TuneConfig) -> dict[str, Any]:
    """Train LoRA (and adapter); the run folder gets `pytorch_lora_weights.safetensors`, `adapter/`, metrics.

    Raises:
        InputError: bad input, no adapter to start from, or a loss that is not finite.
        Stopped: a signal ended the run; its checkpoint is written.
    """
    discriminative = config.objective == "dpt"
    if discriminative and config.model.adapter in (None, "none"):
        raise InputError("`dpt tune` starts from stage 1: give --adapter RUN/adapter of a `dpt probe` run")
    _check_weights(config)
    _tell_unread(config)
    setup = set_up(config)
    config = _put_lora(config, setup)
    cut = _cut_of(config, setup)
    objective: nn.Module
    if discriminative:
        teacher = Teacher.of(config, setup.backbone, setup.adapter, setup.taps)
        objective = TuneObjective(
            setup.backbone,
            setup.adapter,
            setup.taps,
            config.loss,
            config.denoise,
            cut,
            teacher,
            config.lora.lora_itm_rec_share,
        )
    else:
        objective = DenoiseObjective(setup.backbone, config.denoise, cut)

    average = LoraAverage(setup.backbone, config.train.ema_decay) if config.train.ema_decay else None
    pool = OnPolicy.of(config.loss, setup.backbone, setup.examples, config.seed) if discriminative else None

    def save(folder: Path) -> None:
        settings = config.model_dump(mode="json")
        save_lora(setup.backbone, folder, settings)
        shutil.rmtree(folder / ema.FOLDER, ignore_errors=True)  # an earlier run's, which may have kept one
        if average is not None:
            with average.in_place():
                save_lora(setup.backbone, folder / ema.FOLDER, settings)
        if discriminative:
            store_adapter(setup, folder / "adapter", stage="tune", config=settings)

    def save_all(folder: Path) -> None:
        save(folder)
        if pool is not None:
            pool.save(folder)

    def load_all(folder: Path) -> None:
        if discriminative:
            restore_adapter(setup, folder / "adapter")
        if average is not None:
            average.load(folder)
        load_lora(setup.backbone, folder, trainable=True)
        _check_size(config, setup, folder)
        if pool is not None:
            pool.load(folder)

    def validate() -> dict[str, float]:
        found = setup.validation() if discriminative else {}
        return found | setup.validation.denoising(config.denoise)

    def after_step() -> None:
        setup.adapter.clamp_logit_scale()
        if average is not None:
            average.update()

    dropout = config.denoise.caption_dropout
    figures = train(
        Job(
            objective=objective,
            weights=weights_of(config.loss, config.denoise, config.distill),
            feed=Feed(setup.encoder, setup.examples, config.train, config.data, dropout, config.seed, pool),
            output_dir=config.folder,
            save_artifacts=save_all,
            load_artifacts=load_all,
            validate=validate,
            after_step=after_step,
            sample=_samples(config, setup),
            sample_every=config.samples.sample_every,
            backbone=setup.backbone,
            begin=lambda: write_config(config),
        ),
        setup.accelerator,
    )
    if setup.accelerator.is_main_process:
        save(config.folder)
    report_cut(setup.encoder, config.folder)
    finish(setup)
    return result(config.folder, figures, config.train.best_metric)


def _check_weights(config: TuneConfig) -> None:
    """What an objective leaves out may not be asked for, nor may what it consists of be off."""
    denoise, distill = config.denoise, config.distill.distill_coef
    by_error = denoise.denoise_itm_coef + denoise.denoise_dpo_coef
    if config.objective == "denoise_itm" and by_error == 0:
        raise InputError(
            "objective denoise_itm needs a denoise_itm_coef or denoise_dpo_coef over 0; denoise_only is the control"
        )
    if config.objective == "denoise_only" and by_error > 0:
        raise InputError(
            "the control learns from denoising alone; leave out denoise_itm_coef and denoise_dpo_coef, or set "
            "objective to denoise_itm"
        )
    for section, name in ((config.loss, "on_policy_fraction"), (config.lora, "lora_itm_rec_share")):
        if config.objective != "dpt" and getattr(section, name) != getattr(type(section)(), name):
            raise InputError(f"objective {config.objective} has no ITM and REC: leave out {name}, or set it to dpt")
    if config.objective != "dpt" and distill > 0:
        raise InputError(
            f"objective {config.objective} has no teacher: leave out distill_coef, or set objective to dpt"
        )


def _tell_unread(config: TuneConfig) -> None:
    """Warn of weights and their settings that change nothing in this run, where they are not at their default."""
    off: list[tuple[str, Section, str]] = []
    if config.objective != "dpt":
        off.append((f"objective {config.objective} has no ITM and REC", config.loss, ""))
    switched: tuple[tuple[Section, str], ...] = (
        (config.distill, "distill"),
        (config.denoise, "denoise_itm"),
        (config.denoise, "denoise_dpo"),
    )
    for section, prefix in switched:
        if getattr(section, f"{prefix}_coef") == 0:
            off.append((f"{prefix}_coef is 0", section, prefix))
    for why, section, prefix in off:
        plain = type(section)()
        names = [name for name, value in section if name.startswith(prefix) and value != getattr(plain, name)]
        if names:
            log.warning("%s, so it does not read %s", why, ", ".join(names))


def _samples(config: TuneConfig, setup: Setup) -> Samples:
    """Of the prompts in the config, or the first held-out captions."""
    count = config.samples.sample_count
    prompts = config.samples.sample_prompts or [record.captions[0] for record in setup.validation.records[:count]]
    adapter = setup.adapter if config.objective == "dpt" else None
    return Samples(setup.backbone, adapter, setup.taps, prompts, config.samples, config.folder)


def _cut_of(config: TuneConfig, setup: Setup) -> Tap | None:
    name = config.denoise.detach_unet_feature
    if name is None:
        return None
    taps = setup.backbone.parse_taps(name)
    if len(taps) > 1:
        raise InputError(f"detach_unet_feature `{name}` names {len(taps)} blocks; give one")
    if sharding_asked():
        raise InputError("detach_unet_feature does not go with FSDP, which waits for the gradient of every block")
    return taps[0]


def _put_lora(config: TuneConfig, setup: Setup) -> TuneConfig:
    """A fresh LoRA, or the one to go on from; nothing else of the denoiser is trained.

    Returns:
        The config, with the sizes that the LoRA to go on from brings along.
    """
    config = config.model_copy(update={"adapter": setup.config.adapter, "model": setup.config.model})
    settings = config.lora
    setup.backbone.denoiser.requires_grad_(False)
    if config.model.lora in (None, "none"):
        add_lora(setup.backbone, settings.rank, settings.lora_alpha, settings.lora_scope, setup.taps)
        return config
    load_lora(setup.backbone, Path(str(config.model.lora)), trainable=True)
    (rank, alpha), *others = lora_sizes(setup.backbone)
    for key, found in (("rank", rank), ("lora_alpha", alpha)):
        asked = getattr(settings, key)
        if asked not in (found, getattr(LoraSettings(), key)) and not others:
            raise InputError(f"LoRA {config.model.lora} has {key} {found:g}, not {asked:g}; leave {key} out")
    scopes = lora_scopes(setup.backbone, setup.taps)
    if settings.lora_scope not in (LoraSettings().lora_scope, *scopes):
        raise InputError(
            f"LoRA {config.model.lora} has layers of its own ({', '.join(scopes) or 'neither all nor up to the tap'}), "
            f"not those of lora_scope {settings.lora_scope}; leave lora_scope out"
        )
    brought: dict[str, Any] = {"rank": rank, "lora_alpha": alpha}
    if scopes and settings.lora_scope not in scopes:
        brought["lora_scope"] = scopes[0]
    return config.model_copy(update={"lora": settings.model_copy(update=brought)})


def _check_size(config: TuneConfig, setup: Setup, checkpoint: Path) -> None:
    settings, found = config.lora, lora_sizes(setup.backbone)
    asked = settings.rank, float(settings.rank if settings.lora_alpha is None else settings.lora_alpha)
    if asked not in found:
        raise InputError(
            "{} holds a LoRA of rank {} and alpha {:g}, this run asks for {} and {:g}; use its settings".format(
                checkpoint, *found[0], *asked
            )
        )
