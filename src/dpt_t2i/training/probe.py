"""Stage 1: probing. What does a frozen T2I model understand?

    dpt probe --pretrained_model_name_or_path bundled --tap up1 --output_dir runs/probe

The denoiser is frozen; the adapter learns ITM and REC on its features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpt_t2i.adapter.io import load_adapter
from dpt_t2i.backbones.lora import load_lora
from dpt_t2i.config import ProbeConfig
from dpt_t2i.training.encode import report_cut
from dpt_t2i.training.engine import Job, train
from dpt_t2i.training.objective import ProbeObjective, weights_of
from dpt_t2i.training.on_policy import OnPolicy
from dpt_t2i.training.setup import Setup, set_up, store_adapter
from dpt_t2i.training.trackers import METRICS, best_step, read_metrics
from dpt_t2i.training.windows import Feed


def run_probe(config: ProbeConfig) -> dict[str, Any]:
    """Train an adapter on frozen features; the run folder gets `adapter/`, metrics and checkpoints.

    Raises:
        InputError: bad input, or a loss that is not finite.
        Stopped: a signal ended the run; its checkpoint is written.
    """
    setup = set_up(config)
    if config.model.lora not in (None, "none"):
        load_lora(setup.backbone, Path(str(config.model.lora)))  # probe a model that was tuned already
    setup.backbone.denoiser.requires_grad_(False).eval()

    def save(folder: Path) -> None:
        store_adapter(setup, folder / "adapter", stage="probe", config=config.model_dump(mode="json"))

    pool = OnPolicy.of(config.loss, setup.backbone, setup.examples, config.seed)

    def save_all(folder: Path) -> None:
        save(folder)
        if pool is not None:
            pool.save(folder)

    def load_all(folder: Path) -> None:
        restore_adapter(setup, folder)
        if pool is not None:
            pool.load(folder)

    figures = train(
        Job(
            objective=ProbeObjective(setup.backbone, setup.adapter, setup.taps, config.loss),
            weights=weights_of(config.loss),
            feed=Feed(setup.encoder, setup.examples, config.train, config.data, 0.0, config.seed, pool),
            output_dir=config.folder,
            save_artifacts=save_all,
            load_artifacts=load_all,
            validate=setup.validation,
            after_step=setup.adapter.clamp_logit_scale,
            backbone=setup.backbone,
        ),
        setup.accelerator,
    )
    if setup.accelerator.is_main_process:
        save(config.folder)
    report_cut(setup.encoder, config.folder)
    finish(setup)
    return result(config.folder, figures, config.train.best_metric)


def restore_adapter(setup: Setup, checkpoint: Path) -> None:
    """Put a checkpoint's adapter in place, `logit_scale` included."""
    saved, _ = load_adapter(checkpoint / "adapter", setup.backbone.device, setup.backbone.fingerprint())
    setup.adapter.load_state_dict(saved.state_dict())


def finish(setup: Setup) -> None:
    """Wait for what the main process writes, then let go of the other processes and the trackers."""
    setup.accelerator.wait_for_everyone()
    setup.accelerator.end_training()


def result(folder: Path, figures: dict[str, float], best_metric: str | None) -> dict[str, Any]:
    """What the command prints."""
    lines = ["held-out, t = 500:", *(f"{name:10s} {value:.3f}" for name, value in figures.items())]
    rows = read_metrics(folder / METRICS)
    best = best_step({row["step"]: row for row in rows if row["split"] == "val"}, best_metric)
    if best is not None:
        lines.append(f"best checkpoint: checkpoint-{best}")
    return {"output_dir": str(folder), "validation": figures, "best_step": best, "summary": lines}
