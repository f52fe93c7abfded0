"""One optimiser step over a window of micro-batches, on which all processes decide alike."""

from __future__ import annotations

import contextlib
import math
import signal
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from dpt_t2i.objectives.types import Losses
from dpt_t2i.training.faults import describe, save_batch
from dpt_t2i.training.job import Job
from dpt_t2i.training.sharding import ShardedBase, average_gradients
from dpt_t2i.training.signals import Signals
from dpt_t2i.training.windows import Window


@dataclass(frozen=True)
class Outcome:
    """Of one optimiser step, the same on every process."""

    terms: dict[str, float]  # means over the window and the processes
    norm: float  # of the gradient before clipping
    fault: str | None  # what was not finite, where no step was taken
    refused: bool  # fp16: the scaler took no step, since the gradient was out of range at its scale
    signal: int  # that one of the processes got; 0 = none


def take_step(
    job: Job,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: Window,
    step: int,
    signals: Signals | None = None,
    base: ShardedBase | None = None,
) -> Outcome:
    """One optimiser step over a window of micro-batches; none where a loss or the gradient is not finite.

    Nothing is decided before gradients and figures are those of all processes, so that all decide alike.
    """
    boxes = torch.tensor(float(sum(batch.targets.num_boxes() for batch, _ in window)), device=accelerator.device)
    # Each micro-batch is later averaged over the window and over the processes, so its share of the boxes is the mean.
    all_boxes = max(1.0, float(accelerator.reduce(boxes, reduction="sum")))
    num_boxes = all_boxes / accelerator.num_processes / len(window)
    optimizer.zero_grad(set_to_none=True)
    found: list[dict[str, Tensor]] = []
    for index, (batch, draw) in enumerate(window):
        with _maybe_no_sync(accelerator, model, base is None and index < len(window) - 1):
            with accelerator.autocast():
                terms = model(batch, draw, num_boxes)
            total = Losses(terms, job.weights).total
            accelerator.backward(total / len(window))
        found.append({name: value.detach() for name, value in {**terms, "loss": total}.items()})
    if base is not None:
        base.settle()
        average_gradients([parameter for parameter in model.parameters() if parameter.requires_grad], accelerator)
    norm = _clip(job, accelerator, model)
    names = sorted(found[0])
    figures = [torch.stack([terms[name] for terms in found]).mean() for name in names]
    received = signals.received if signals is not None else 0
    figures.append(torch.tensor(float(received), device=accelerator.device))
    *means, asked = accelerator.reduce(torch.stack([value.float() for value in figures]), reduction="mean").tolist()
    fault = None
    scaled = accelerator.scaler is not None  # then a gradient out of range is the scaler's affair: it skips the step
    if not all(map(math.isfinite, means)) or not (scaled or math.isfinite(norm)):
        fault = _fault(job, accelerator, window, found, norm, step)
    refused = False
    if fault is None or scaled:
        optimizer.step()
        refused = scaled and bool(accelerator.optimizer_step_was_skipped)
        if job.after_step is not None and not refused:
            job.after_step()
    stop = (received or int(signal.SIGTERM)) if asked else 0  # another process may have been asked
    return Outcome(dict(zip(names, means, strict=True)), norm, fault, refused, stop)


def _clip(job: Job, accelerator: Accelerator, model: nn.Module) -> float:
    """Hold the gradient, or that of each of the job's parts, to `max_grad_norm`; the whole one's norm before."""
    limit = job.feed.train.max_grad_norm
    if not job.clipped_apart:
        clipped = accelerator.clip_grad_norm_(model.parameters(), limit)
        return float(clipped) if clipped is not None else 0.0
    accelerator.unscale_gradients()
    norms = [nn.utils.clip_grad_norm_(part.parameters(), limit) for part in job.clipped_apart]
    return float(torch.stack(norms).norm())


def _fault(
    job: Job,
    accelerator: Accelerator,
    window: Window,
    found: list[dict[str, Tensor]],
    norm: float,
    step: int,
) -> str:
    """What is not finite, in the words of the first process that saw it; each of these keeps its batch."""
    terms = [{name: float(value) for name, value in row.items()} for row in found]
    mine = describe(terms, norm, [batch.records for batch, _ in window])
    own = [mine] if not all(math.isfinite(value) for row in terms for value in row.values()) else []
    everyone = gather_object(own) or gather_object([mine])
    said = everyone[0]
    if mine in everyone:
        return f"{said}; {save_batch(job.output_dir, step + 1, accelerator.process_index, window, mine)}"
    return f"{said}; its batch is in {job.output_dir / 'nan'}"


def _maybe_no_sync(accelerator: Accelerator, model: nn.Module, skip: bool):  # type: ignore[no-untyped-def]
    """Gradients are exchanged once a step, with its last micro-batch."""
    return accelerator.no_sync(model) if skip else contextlib.nullcontext()
