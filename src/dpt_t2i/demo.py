"""`dpt demo`: the whole loop in minutes on a CPU, live, beside what ships with the base.

    probe -> tune -> generate with self-correction -> measure -> look

The live adapter and LoRA learn for a minute or two: they show that the loop runs, not what it can do. The shipped ones
had hours. Every figure says which it is.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpt_t2i.adapter.io import read_adapter_card
from dpt_t2i.backbones.loading import choose_artifacts
from dpt_t2i.config import (
    AlignmentConfig,
    ConfigT,
    DemoConfig,
    ProbeConfig,
    TuneConfig,
    build_config,
)
from dpt_t2i.errors import InputError, Stopped
from dpt_t2i.evaluation.commands import run_alignment
from dpt_t2i.publish.report import write_report
from dpt_t2i.sampling.generate import parse_seeds
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.tune import run_tune

log = logging.getLogger(__name__)
STAGES = ("probe", "tune")
MARK = ".demo"  # in a folder whose stages are a demo's
VALIDATION = 96  # held-out examples
PAPERS_CORRECTION = 0.5  # where no strength is stored with the adapter


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the loop and write `report.html`.

    Raises:
        InputError: several processes, a base that ships no adapter and LoRA to compare with, or anything that the
            stages refuse.
        Stopped: by a signal during a stage.
    """
    try:
        return _run(config)
    except Stopped as stop:
        again = f"{signal.Signals(stop.signal).name}: stopped; another `dpt demo` begins anew"
        raise Stopped(stop.signal, again) from None


def _run(config: DemoConfig) -> dict[str, Any]:
    start = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("the demo is for one process; start it without a launcher")
    if not config.sample.lora_draws:
        raise InputError("the demo shows what the LoRA draws; leave no_lora_draws out")
    parse_seeds(config.seeds)  # refused before an earlier demo is cleared away
    base = config.model.pretrained_model_name_or_path
    lora, adapter = choose_artifacts(base, config.model.lora, config.model.adapter, config.model.revision)
    if lora is None or adapter is None:
        refused = "none" in (config.model.lora, config.model.adapter)
        what = "none was to be loaded" if refused else f"base `{base}` ships none"
        raise InputError(f"the demo needs a LoRA and an adapter to compare its own with, and {what}")
    card = read_adapter_card(adapter)
    folder = config.output_dir
    _clear(folder)
    log.info("1/4 probe: %d steps on the frozen base", config.probe_steps)
    probe = run_probe(_stage(ProbeConfig, config, card, "probe", config.probe_steps, learning_rate=1e-3))
    log.info("2/4 tune: %d steps on ITM + REC + denoising", config.tune_steps)
    live_adapter = str(folder / "probe" / "adapter")
    tuned = run_tune(
        _stage(
            TuneConfig,
            config,
            card,
            "tune",
            config.tune_steps,
            learning_rate=3e-4,
            adapter=live_adapter,
            gradient_accumulation_steps=1,
        )
    )
    log.info("3/4 generate and judge: base, live and shipped on %d prompts", config.demo_prompts)
    result = run_alignment(_alignment(config, card, lora, adapter))
    log.info("4/4 report")
    report = write_report(
        folder / "report.html",
        alignment=result,
        arms_folder=folder / "alignment" / "arms",
        metrics={"live probe": folder / "probe" / "metrics.jsonl", "live tune": folder / "tune" / "metrics.jsonl"},
        probe=None,
        title="DPT demo",
        notes=_notes(config, result, probe, tuned),
    )
    minutes = (time.perf_counter() - start) / 60
    return {
        "output_dir": str(folder),
        "report": str(report),
        "arms": result["arms"],
        "minutes": minutes,
        "summary": [
            f"base             {_percent(result, 'base')} of {result['prompts']} prompts right",
            f"live DPT         {_percent(result, 'live')} after {config.probe_steps} + {config.tune_steps} steps",
            f"shipped DPT      {_percent(result, 'dpt')} the LoRA that comes with the base",
            f"  + correction   {_percent(result, 'dpt_correct')} along its own matching score; its pick of four images "
            f"{_percent(result, 'dpt_best4')}",
            f"took {minutes:.1f} minutes; open {report}",
        ],
    }


def _clear(folder: Path) -> None:
    """A demo run again starts again, but for its finished images; of anybody else's runs nothing is removed.

    Raises:
        InputError: stages are there, and not from a demo.
    """
    for stage in STAGES:
        if (folder / stage).exists() and not (folder / MARK).is_file():
            raise InputError(f"{folder / stage} is there and no demo's; give another --output_dir")
        shutil.rmtree(folder / stage, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def _stage(
    kind: type[ConfigT], config: DemoConfig, card: Mapping[str, Any], name: str, steps: int, **overrides: Any
) -> ConfigT:
    """A short run with the sizes and the tap of the shipped adapter."""
    common = {
        "pretrained_model_name_or_path": config.model.pretrained_model_name_or_path,
        "revision": config.model.revision,
        "device": config.model.device,
        "dtype": config.model.dtype,
        "tap": "_".join(card["tap_channels"]),
        "max_train_steps": steps,
        "train_batch_size": config.demo_batch_size,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(10, steps),
        "checkpointing_steps": steps,
        "validation_steps": steps,
        "val_samples": VALIDATION,
        "output_dir": config.output_dir / name,
        "seed": config.seed,
    }
    sizes = {f"adapter.{key}": value for key, value in card["adapter"].items()}
    return build_config(kind, overrides=common | sizes | overrides)


def _alignment(config: DemoConfig, card: Mapping[str, Any], lora: Path, adapter: Path) -> AlignmentConfig:
    """Live and shipped weights as arms of one comparison, on the same prompts and seeds."""
    model = config.model.model_copy(update={"lora": str(lora), "adapter": str(adapter)})
    settings = AlignmentConfig(
        model=model,
        suite="dev",
        arms=("base", "live", "live_correct", "dpt", "dpt_correct", "dpt_best4"),
        live_lora=config.output_dir / "tune",
        seeds=config.seeds,
        max_prompts=config.demo_prompts,
        sample=config.sample,
        output_dir=config.output_dir / "alignment",
        seed=config.seed,
    )
    stored = card["metadata"].get("correction") or {"correct": PAPERS_CORRECTION}
    return settings.model_copy(update={"correction": settings.correction.model_copy(update=stored)})


def _notes(
    config: DemoConfig, result: Mapping[str, Any], probe: Mapping[str, Any], tuned: Mapping[str, Any]
) -> list[str]:
    return [
        f"Measured on only {result['prompts']} dev prompts, so the intervals are wide. "
        "The figures of a full run are in the bundled model's card.",
        f"live, live_correct: made just now on this machine, {config.probe_steps} steps of probing and "
        f"{config.tune_steps} of tuning at batch {config.demo_batch_size}. They show that the loop runs, not what it "
        "can do: an adapter trained so briefly gives poor gradients, so correcting as strongly as with the shipped one "
        "makes live_correct worse. dpt, dpt_correct, "
        "dpt_best4: the LoRA and the adapter that ship with the base.",
        f"Live adapter on held-out scenes, after probing: {_figures(probe)}; after tuning: {_figures(tuned)}.",
    ]


def _percent(result: Mapping[str, Any], arm: str) -> str:
    return f"{100 * result['arms'][arm]['overall']:.0f} %"


def _figures(result: Mapping[str, Any]) -> str:
    shares = {name: value for name, value in result["validation"].items() if not name.startswith("loss")}
    return ", ".join(f"{name} {100 * value:.0f} %" for name, value in shares.items())
