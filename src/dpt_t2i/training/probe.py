"""Stage 1: probing. What does a frozen T2I model understand?

    dpt probe --pretrained_model_name_or_path bundled --tap up1 --output_dir runs/probe
    dpt probe --pretrained_model_name_or_path bundled --taps all --output_dir runs/atlas

The denoiser is frozen; the adapter learns ITM and REC on its features. With `taps` each tap has a small adapter of its
own, and the run ends with an atlas of what they can tell at which timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dpt_t2i.adapter.io import load_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.lora import load_lora
from dpt_t2i.config import ProbeConfig
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.provenance import write_json
from dpt_t2i.training.atlas import ATLAS, AtlasValidation, atlas_lines
from dpt_t2i.training.encode import report_cut
from dpt_t2i.training.engine import train
from dpt_t2i.training.job import Job
from dpt_t2i.training.objective import AtlasObjective, ProbeObjective, weights_of
from dpt_t2i.training.on_policy import OnPolicy
from dpt_t2i.training.setup import Setup, set_up, set_up_each, store_adapter, write_config
from dpt_t2i.training.trackers import METRICS, best_step, read_metrics
from dpt_t2i.training.validation import TIMESTEP, Validation
from dpt_t2i.training.windows import Feed


def run_probe(config: ProbeConfig) -> dict[str, Any]:
    """Train an adapter on frozen features; the run folder gets `adapter/`, metrics and checkpoints.

    With `atlas.taps` it gets `adapters/TAP/` for each of them, and `atlas.json`.

    Raises:
        InputError: bad input, or a loss that is not finite.
        Stopped: a signal ended the run; its checkpoint is written.
    """
    if config.atlas.taps is not None:
        return _probe_each(config)
    setup = set_up(config)
    objective = ProbeObjective(setup.backbone, setup.adapter, setup.taps, config.loss)
    figures = _learn(config, {"adapter": setup}, objective, setup.validation)
    finish(setup)
    return result(config.folder, figures, config.train.best_metric)


def _probe_each(config: ProbeConfig) -> dict[str, Any]:
    """One pass of the denoiser feeds an adapter at each tap; then all of them are measured bucket by bucket."""
    setups = set_up_each(config)
    validation = AtlasValidation(config, setups)
    readers, shared = validation.readers, next(iter(setups.values()))
    objective = AtlasObjective(readers.backbone, readers.adapters, readers.taps, config.loss)
    atlas: dict[str, Any] = {}
    folders = {f"adapters/{tap}": setup for tap, setup in setups.items()}
    figures = _learn(config, folders, objective, validation, lambda: atlas.update(validation.atlas()))
    found = result(config.folder, figures, config.train.best_metric)
    if shared.accelerator.is_main_process:
        write_json(config.folder / ATLAS, atlas)
        found |= {"atlas": atlas, "summary": atlas_lines(atlas)}
    finish(shared)
    return found


def _learn(
    config: ProbeConfig,
    setups: Mapping[str, Setup],
    objective: nn.Module,
    validate: Validation | AtlasValidation,
    at_end: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train the adapters of `setups` (folder inside the run -> setup), which share all else; the last held-out figures.

    Their gradients are clipped each by its own norm, so that none feels another.
    """
    setup = next(iter(setups.values()))
    if config.model.lora not in (None, "none"):
        load_lora(setup.backbone, Path(str(config.model.lora)))  # probe a model that was tuned already
    setup.backbone.denoiser.requires_grad_(False).eval()

    def save(folder: Path) -> None:
        for name, one in setups.items():
            store_adapter(one, folder / name, stage="probe", config=setup.config.model_dump(mode="json"))

    pool = OnPolicy.of(config.loss, setup.backbone, setup.examples, config.seed)

    def save_all(folder: Path) -> None:
        save(folder)
        if pool is not None:
            pool.save(folder)

    def load_all(folder: Path) -> None:
        for name, one in setups.items():
            restore_adapter(one, folder / name)
        if pool is not None:
            pool.load(folder)

    def after_step() -> None:
        for one in setups.values():
            one.adapter.clamp_logit_scale()

    figures = train(
        Job(
            objective=objective,
            weights=weights_of(config.loss),
            feed=Feed(setup.encoder, setup.examples, config.train, config.data, 0.0, config.seed, pool),
            output_dir=config.folder,
            save_artifacts=save_all,
            load_artifacts=load_all,
            validate=validate,
            after_step=after_step,
            clipped_apart=[one.adapter for one in setups.values()],
            backbone=setup.backbone,
            begin=lambda: write_config(setup.config),
            at_end=at_end,
        ),
        setup.accelerator,
    )
    if setup.accelerator.is_main_process:
        save(config.folder)
    report_cut(setup.encoder, config.folder)
    return figures


def restore_adapter(setup: Setup, folder: Path) -> None:
    """Put the adapter of a checkpoint's `folder` in place, `logit_scale` included.

    Raises:
        InputError: it is of other sizes, or reads another tap, than this run asks for.
    """
    saved, _ = load_adapter(folder, setup.backbone.device, setup.backbone.fingerprint())
    found, asked = ({"tap": one.tap_text, **_shapes(one)} for one in (saved, setup.adapter))
    if differing := [key for key in found if found[key] != asked[key]]:
        key = differing[0]
        raise InputError(f"{folder} has {key} {found[key]}, this run asks for {asked[key]}; use its settings")
    setup.adapter.load_state_dict(saved.state_dict())


def _shapes(adapter: DiscriminativeAdapter) -> dict[str, Any]:
    """The settings that decide what weights it has."""
    return adapter.config.model_dump(exclude={"dropout", "normalize_features", "grounding_text"})


def finish(setup: Setup) -> None:
    """Wait for what the main process writes, then let go of the other processes and the trackers."""
    setup.accelerator.wait_for_everyone()
    setup.accelerator.end_training()


def result(folder: Path, figures: dict[str, float], best_metric: str | None) -> dict[str, Any]:
    """What the command prints."""
    lines = [f"{name:10s} {value:.3f}" for name, value in figures.items()]
    over = " (loss_mse over all noise levels)" if "loss_mse" in figures else ""
    lines.insert(0, f"held-out, t = {TIMESTEP}{over}:" if lines else "no held-out figure")
    rows = read_metrics(folder / METRICS)
    best = best_step({row["step"]: row for row in rows if row["split"] == "val"}, best_metric)
    if best is not None:
        gone = "" if (folder / f"checkpoint-{best}").is_dir() else f"step {best}, which is not kept"
        lines.append(f"best checkpoint: {gone or f'checkpoint-{best}'}")
    return {"output_dir": str(folder), "validation": figures, "best_step": best, "summary": lines}
