"""The loop that both stages share: windows of micro-batches, one optimiser step each, from any step on.

Everything random in step s follows from (seed, s): the examples, noise, timesteps, dropped captions, dropout. So the
same training comes out after a stop, and (but for dropout's masks) on one process or several.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dpt_t2i.config import DataConfig, TrainConfig
from dpt_t2i.data.examples import Batch, Examples, MicroBatches, collate
from dpt_t2i.errors import InputError
from dpt_t2i.training.checkpoint import drop_later, find_checkpoint, read_optimizer, write_checkpoint
from dpt_t2i.training.encode import Encoded, Encoder
from dpt_t2i.training.objective import Draw, weigh
from dpt_t2i.training.trackers import Metrics

LOG_EVERY = 10


@dataclass(frozen=True)
class Job:
    """What a recipe hands to the engine."""

    objective: nn.Module  # forward(Encoded, Draw, num_boxes) -> loss terms
    weights: Mapping[str, float]
    encoder: Encoder
    examples: Examples
    train: TrainConfig
    data: DataConfig
    caption_dropout: float
    seed: int
    output_dir: Path
    save_artifacts: Callable[[Path], None]
    load_artifacts: Callable[[Path], None]  # put a checkpoint's weights back in place
    validate: Callable[[], dict[str, float]]
    refresh: Callable[[int, Batch], Batch] | None = None  # may replace examples of a batch (on-policy negatives)
    after_step: Callable[[], None] | None = None  # keeps parameters inside their bounds


def train(job: Job, accelerator: Accelerator) -> dict[str, float]:
    """Run until `max_train_steps` and return the last validation's figures.

    Raises:
        InputError: a loss is not finite: names the step and the records, and leaves checkpoints as they are.
    """
    settings = job.train
    checkpoint = find_checkpoint(job.output_dir, settings.resume_from_checkpoint)
    if checkpoint is not None:
        job.load_artifacts(checkpoint)  # may put new parameters in place, so it comes before the optimiser
    parameters = {name: p for name, p in job.objective.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, weight_decay=settings.adam_weight_decay
    )
    first, identity = 0, _identity(job, accelerator)
    saved: dict[str, Any] = {}
    if checkpoint is not None:
        saved = read_optimizer(checkpoint, parameters, optimizer)
        first = int(saved["step"])
        _check_identity(checkpoint, saved, identity)
        if accelerator.is_main_process:
            drop_later(job.output_dir, first)
    factor = _rate_factor(settings)
    model, wrapped = accelerator.prepare(job.objective, optimizer)
    if accelerator.scaler is not None and saved.get("scaler"):
        accelerator.scaler.load_state_dict(saved["scaler"])
    metrics = Metrics(job.output_dir, accelerator, first)
    windows = _windows(job, accelerator, first)
    figures: dict[str, float] = {}
    if first == 0:
        figures = job.validate()
        metrics.write(0, "val", figures)
    bar = tqdm(
        total=settings.max_train_steps, initial=first, desc="train", disable=not accelerator.is_local_main_process
    )
    clock, since = time.perf_counter(), first
    with bar as progress:  # closed by an error too, whose line then stands by itself
        for step, window in enumerate(windows, start=first):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor(step)
            torch.manual_seed(_mix(job.seed, step, accelerator.process_index))  # dropout
            model.train()
            terms, norm = _step(job, accelerator, model, wrapped, window, step)
            done = step + 1
            if done % LOG_EVERY == 0 or done == settings.max_train_steps:
                seen = (done - since) * settings.train_batch_size * len(window) * accelerator.num_processes
                speed = seen / (time.perf_counter() - clock)
                row = terms | {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "images_per_s": speed}
                metrics.write(done, "train", row)
                progress.set_postfix(loss=f"{terms['loss']:.3f}", images_per_s=f"{speed:.1f}")
                clock, since = time.perf_counter(), done
            progress.update(1)
            last = done == settings.max_train_steps
            if last or done % settings.validation_steps == 0:
                figures = job.validate()
                metrics.write(done, "val", figures)
                clock, since = time.perf_counter(), done
            if (last or done % settings.checkpointing_steps == 0) and accelerator.is_main_process:
                _save(job, accelerator, done, parameters, optimizer, identity)
    return figures


def _save(
    job: Job,
    accelerator: Accelerator,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> None:
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    extra, keep = {**identity, "scaler": scaler}, job.train.checkpoints_total_limit
    write_checkpoint(job.output_dir, step, parameters, optimizer, job.save_artifacts, extra, keep)


def _identity(job: Job, accelerator: Accelerator) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it: else other examples are seen."""
    return {
        "examples_a_step": job.train.train_batch_size
        * job.train.gradient_accumulation_steps
        * accelerator.num_processes,
        "seed": job.seed,
        "data_seed": job.data.data_seed,
        "records": len(job.examples.records),
        "center_crop": job.examples.center_crop,
        "random_flip": job.examples.random_flip,
    }


def _check_identity(checkpoint: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    for key, value in identity.items():
        if saved.get(key, value) != value:
            raise InputError(
                f"{checkpoint} was written with {key} = {saved[key]}, this run has {value}; use its settings"
            )


def _step(
    job: Job,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: list[tuple[Encoded, Draw]],
    step: int,
) -> tuple[dict[str, float], float]:
    """One optimiser step over a window of micro-batches; mean loss terms over it, and the gradient's norm."""
    boxes = torch.tensor(float(sum(batch.targets.num_boxes() for batch, _ in window)), device=accelerator.device)
    # Each micro-batch is later averaged over the window and over the processes, so its share of the boxes is the mean.
    all_boxes = max(1.0, float(accelerator.reduce(boxes, reduction="sum")))
    num_boxes = all_boxes / accelerator.num_processes / len(window)
    where = f"step {step + 1}, records {[list(batch.records) for batch, _ in window]}"
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for index, (batch, draw) in enumerate(window):
        last = index == len(window) - 1
        with _maybe_no_sync(accelerator, model, not last):
            try:
                terms = model(batch, draw, num_boxes)
            except InputError as error:
                raise InputError(f"{where}: {error}; the last checkpoint in {job.output_dir} is intact") from error
            total = weigh(terms, job.weights).total / len(window)
            if not torch.isfinite(total):
                named = {name: value.item() for name, value in terms.items()}
                raise InputError(
                    f"the loss is not finite at {where}: {named}; lower learning_rate or mend the data; "
                    f"the last checkpoint in {job.output_dir} is intact"
                )
            accelerator.backward(total)
        for name, value in {**terms, "loss": total * len(window)}.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / len(window)
    norm = accelerator.clip_grad_norm_(model.parameters(), job.train.max_grad_norm)
    if accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
        raise InputError(f"the gradient is not finite at {where}; the last checkpoint in {job.output_dir} is intact")
    optimizer.step()
    if job.after_step is not None:
        job.after_step()
    names = sorted(sums)
    means = accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="mean").tolist()
    return dict(zip(names, means, strict=True)), float(norm) if norm is not None else 0.0


def _windows(job: Job, accelerator: Accelerator, first: int) -> Iterator[list[tuple[Encoded, Draw]]]:
    """The encoded micro-batches of each optimiser step from `first` on."""
    settings, world, rank = job.train, accelerator.num_processes, accelerator.process_index
    accumulation = settings.gradient_accumulation_steps
    order = MicroBatches(settings.train_batch_size, accumulation, rank, world, first, settings.max_train_steps)
    loader = DataLoader(
        job.examples, batch_sampler=order, collate_fn=collate, num_workers=job.data.dataloader_num_workers
    )
    stream = iter(loader)
    for step in range(first, settings.max_train_steps):
        window: list[tuple[Encoded, Draw]] = []
        draws: list[Draw] = []
        for micro in range(accumulation):
            batch = _next(stream)
            encoded = job.encoder(batch if job.refresh is None else job.refresh(step, batch))
            draws = draws or _draws(job, step, accumulation * world, len(encoded), encoded.latents)
            window.append((encoded, draws[micro * world + rank]))
        yield window


def _next(stream: Iterator[Batch]) -> Batch:
    """The next batch; bad input met in a loader process comes back inside that process's traceback."""
    try:
        return next(stream)
    except InputError as error:
        raise InputError(str(error).rpartition("InputError: ")[2]) from error


def _draws(job: Job, step: int, parts: int, count: int, like: Tensor) -> list[Draw]:
    """Noise, timesteps and dropped captions of a whole optimiser step, in the order of its examples, cut into parts.

    So 1 process x batch 8, 2 x 4 and 1 x 4 with accumulation 2 all see the same.
    """
    total, device = parts * count, like.device
    generator = torch.Generator().manual_seed(_mix(job.seed, step, 0) ^ 0x5EED)
    noise = torch.randn(total, *like.shape[1:], generator=generator).to(device)
    timesteps = torch.randint(job.train.min_timestep, job.train.max_timestep + 1, (total,), generator=generator)
    drop = torch.rand(total, generator=generator) < job.caption_dropout
    split = zip(noise.split(count), timesteps.to(device).split(count), drop.to(device).split(count), strict=True)
    return [Draw(*part) for part in split]


def _rate_factor(settings: TrainConfig) -> Callable[[int], float]:
    """Multiplier of the learning rate at an optimiser step; steps are global, on any number of processes."""
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0),  # only its formula is wanted
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    return schedule.lr_lambdas[0]


def _maybe_no_sync(accelerator: Accelerator, model: nn.Module, skip: bool):  # type: ignore[no-untyped-def]
    """Gradients are exchanged once a step, with its last micro-batch."""
    return accelerator.no_sync(model) if skip else contextlib.nullcontext()


def _mix(seed: int, step: int, rank: int) -> int:
    """One number from three, without collisions in any run of less than 2^31 steps."""
    return ((seed * 1_000_003 + rank) * 2**31 + step) % 2**63
