"""The loop that both stages share: windows of micro-batches, one optimiser step each, from any step on.

Everything random in step s follows from (seed, s): the examples, noise, timesteps, dropped captions, dropout. So the
same training comes out after a stop, and (but for dropout's masks) on one process or several; streamed shards are dealt
out over processes, and show other examples on another number of them.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from dpt_t2i.config import TrainConfig
from dpt_t2i.errors import InputError, Stopped
from dpt_t2i.files import keep_copy
from dpt_t2i.training.checkpoint import (
    STATE,
    drop,
    find_checkpoint,
    later,
    read_optimizer,
    rotate,
    told_intact,
    write_checkpoint,
)
from dpt_t2i.training.job import Job
from dpt_t2i.training.occupied import occupied
from dpt_t2i.training.optimizer import make_optimizer
from dpt_t2i.training.progress import Progress
from dpt_t2i.training.sharding import ShardedBase, sharding_asked
from dpt_t2i.training.signals import Signals
from dpt_t2i.training.step import Outcome, take_step
from dpt_t2i.training.trackers import METRICS, Metrics, close_trackers
from dpt_t2i.training.windows import Feed, Window, mix, windows

LOG_EVERY = 10
MAX_SKIPPED = 20  # steps in a row without a finite loss: then nothing is being learned

log = logging.getLogger(__name__)


def train(job: Job, accelerator: Accelerator) -> dict[str, float]:
    """Run until `max_train_steps` and return the last validation's figures.

    Raises:
        InputError: a loss is not finite and `on_nan` is `stop`, or a checkpoint cannot be written; names the step and
            leaves checkpoints as they are.
        Stopped: SIGTERM or SIGINT came; the step's checkpoint is written.
    """
    try:
        with occupied(job.output_dir if accelerator.is_main_process else None):
            run = _Run(job, accelerator)
            with Signals() as signals, run.progress.bar:  # closed by an error too, whose line then stands by itself
                run.look()
                for step, window in enumerate(_sound(run, windows(job.feed, accelerator, run.step)), start=run.step):
                    run.take(step, window, signals)
            run.end()
    except BaseException:
        close_trackers(accelerator)
        raise
    _tell_left_out(job.feed, accelerator)
    return run.metrics.held_out.get(run.step, {})


class _Run:
    """A run between two steps: what a checkpoint holds and `train` goes on with."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self.job, self.accelerator, self.settings = job, accelerator, job.feed.train
        checkpoint = find_checkpoint(job.output_dir, self.settings.resume_from_checkpoint)
        if checkpoint is not None:
            job.load_artifacts(checkpoint)  # may put new parameters in place, so it comes before the optimiser
        self.parameters = {name: p for name, p in job.objective.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters.values(), self.settings)
        self.identity = _identity(job, accelerator)
        self.step, self.skipped, self.in_a_row = 0, 0, 0
        self.owed = False  # a checkpoint that was due
        saved: dict[str, Any] = {}
        if checkpoint is not None:
            saved = read_optimizer(checkpoint, self.parameters, self.optimizer)
            _check_identity(checkpoint, saved, self.identity)
            self.step, self.skipped = int(saved["step"]), int(saved.get("skipped", 0))
        self.first = self.step
        _check_same(accelerator, checkpoint, self.step)
        self.replaced = self._replaced() if accelerator.is_main_process and checkpoint is not None else []
        if job.begin is not None and accelerator.is_main_process:
            job.begin()
        self.factor = _rate_factor(self.settings)
        self.base = _sharded_base(job, accelerator)
        if self.base is None:
            self.model, self.wrapped = accelerator.prepare(job.objective, self.optimizer)
        else:
            self.model, self.wrapped = job.objective, accelerator.prepare_optimizer(self.optimizer)
        _count_on_cpu(self.optimizer)
        if accelerator.scaler is not None and saved.get("scaler"):
            accelerator.scaler.load_state_dict(saved["scaler"])
        self.metrics = Metrics(job.output_dir, accelerator, self.step)
        if accelerator.is_main_process:
            self._tell_begin(checkpoint)
        self.progress = Progress(
            self.settings.max_train_steps,
            self.step,
            self.identity["examples_a_step"],
            accelerator.is_local_main_process,
        )

    def _tell_begin(self, checkpoint: Path | None) -> None:
        world, total = self.accelerator.num_processes, self.settings.max_train_steps
        if checkpoint is not None:
            left = f"step {self.step} of {total}" if self.step < total else f"all of {total} steps are done already"
            log.info("goes on from %s: %s", checkpoint, left)
        log.info(
            "%d %s on %s, %d examples a step",
            world, "process" if world == 1 else "processes", self.accelerator.device,
            self.identity["examples_a_step"],
        )  # fmt: skip

    def take(self, step: int, window: Window, signals: Signals) -> None:
        """One optimiser step and all that is due after it."""
        rate = self.settings.learning_rate * self.factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(mix(self.job.feed.seed, step, self.accelerator.process_index))  # dropout
        self.model.train()
        outcome = take_step(self.job, self.accelerator, self.model, self.wrapped, window, step, signals, self.base)
        self.step = step + 1
        self._count(outcome)
        if self.step % LOG_EVERY == 0 or self.step == self.settings.max_train_steps:
            row = outcome.terms | {"lr": rate, "grad_norm": outcome.norm}
            row |= {"images_per_s": self.progress.images_per_s(self.step)}
            row |= {"skipped": self.skipped} if self.settings.on_nan == "skip" else {}
            self.metrics.write(self.step, "train", row)
            self.progress.show(self.step, row)
        self.progress.bar.update(1)
        if outcome.signal:
            self.save()
            # A launcher ends the others when one process is gone: none goes before the checkpoint is whole.
            self.accelerator.wait_for_everyone()
            name, steps = signal.Signals(outcome.signal).name, f"step {self.step} of {self.settings.max_train_steps}"
            raise Stopped(
                outcome.signal,
                f"{name}: stopped at {steps}; go on with --resume_from_checkpoint latest in {self.job.output_dir}",
            )
        # First of all the checkpoint: validation and samples may fail, and take long.
        # In a streak of steps without a finite loss nothing is learned that were worth an older checkpoint: it comes
        # with the next sound step.
        self.owed = self.owed or self._due(self.settings.checkpointing_steps)
        is_kept = self.owed and (self.in_a_row == 0 or self.step == self.settings.max_train_steps)
        if is_kept:
            self.save()
        if self.look():
            self._rotate() if is_kept else self.save()

    def look(self) -> bool:
        """Validation and samples where they are due and not yet in the metrics; whether this is the best so far.

        A run that was stopped by a signal right after a step does them when it goes on.
        """
        job, metrics, better = self.job, self.metrics, False
        if (self.step == 0 or self._due(self.settings.validation_steps)) and self.step not in metrics.held_out:
            with self._whole_base():
                metrics.write(self.step, "val", job.validate())
            if self.accelerator.is_main_process and metrics.held_out[self.step]:
                found = "  ".join(f"{name} {value:.3f}" for name, value in metrics.held_out[self.step].items())
                log.info("step %d, held out: %s", self.step, found)
            better = metrics.best(self.settings.best_metric) == self.step
            self.progress.restart(self.step)
        due = job.sample_every and self.step and self.step % job.sample_every == 0
        if job.sample is not None and due and self.step not in metrics.sampled:
            with self._whole_base():
                if self.accelerator.is_main_process:
                    try:
                        metrics.write(self.step, "samples", job.sample(self.step))
                    except Exception as error:  # no memory, a full disk: no reason to end a run of days
                        log.warning("step %d: no samples: %s", self.step, error)
            self.progress.restart(self.step)
        return better

    def end(self) -> None:
        if self.job.at_end is not None:
            with self._whole_base():
                self.job.at_end()

    def save(self) -> None:
        """The checkpoint of this step; of the earlier ones the newest stay, and the best by validation."""
        self.owed = False
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        extra = {**self.identity, "scaler": scaler, "skipped": self.skipped}
        limit = self.settings.checkpoints_total_limit
        written = write_checkpoint(
            self.job.output_dir,
            self.step,
            self.parameters,
            self.optimizer,
            self.job.save_artifacts,
            extra,
            limit + len(self.replaced),  # which are newer by their number
            spared=self._spared(),
        )
        if self.replaced:
            drop(path for path in self.replaced if path != written)
            self.replaced = []
            self._rotate()

    def _rotate(self) -> None:
        """Once more where a validation behind the checkpoint found another one the best."""
        if self.accelerator.is_main_process:
            rotate(self.job.output_dir, self.settings.checkpoints_total_limit, self._spared())

    def _spared(self) -> tuple[int, ...]:
        best = self.metrics.best(self.settings.best_metric)
        return () if best is None else (best,)

    def _replaced(self) -> list[Path]:
        """Checkpoints after the one gone on from: they go once the first new one is whole, and are told before; the
        metrics of before stay in a file of their own.
        """
        run = self.job.output_dir
        gone = later(run, self.step)
        if gone:
            stays = (
                f"; the metrics of before stay in {keep_copy(run / METRICS).name}" if (run / METRICS).is_file() else ""
            )
            log.warning(
                "goes back to step %d: %s will be removed with the first new checkpoint%s",
                self.step, ", ".join(path.name for path in gone), stays,
            )  # fmt: skip
        return gone

    def _whole_base(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.base is None else self.base.whole()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.max_train_steps

    def _count(self, outcome: Outcome) -> None:
        """Steps without a finite loss: the end, or a count. Those that fp16's scaler refuses are only too many where
        lowering its scale never helps: the gradient is not finite at any.
        """
        self.in_a_row = self.in_a_row + 1 if outcome.fault or outcome.refused else 0
        if outcome.fault is None:
            if self.in_a_row == MAX_SKIPPED:
                raise InputError(
                    f"step {self.step}: the gradient was not finite in {MAX_SKIPPED} steps in a row, at any scale of "
                    f"fp16; give --mixed_precision bf16, or mend the data; {told_intact(self.job.output_dir)}"
                )
            return
        self.skipped += 1
        if self.settings.on_nan == "stop" or self.in_a_row == MAX_SKIPPED:
            many = f" ({MAX_SKIPPED} in a row)" if self.in_a_row == MAX_SKIPPED else ""
            raise InputError(
                f"step {self.step}{many}: {outcome.fault}; lower learning_rate or mend the data; "
                f"{told_intact(self.job.output_dir)}"
            )


def _sound(run: _Run, stream: Iterator[Window]) -> Iterator[Window]:
    """The windows; a record that turns out to be broken ends the run with a checkpoint, and its step is named."""
    try:
        yield from stream
    except InputError as error:
        if run.accelerator.num_processes > 1 or run.step == run.first:  # others are elsewhere, or nothing is new
            raise InputError(f"step {run.step + 1}: {error}") from error
        run.save()
        raise InputError(
            f"step {run.step + 1}: {error}; checkpoint-{run.step} is kept, and --on_bad skip leaves such records out"
        ) from error


def _tell_left_out(feed: Feed, accelerator: Accelerator) -> None:
    """How many faults all processes met, each counted once."""
    total = len(set(gather_object(list(feed.left_out.said))))
    if total and accelerator.is_main_process:
        log.warning("%d broken records or pictures were left out of this run", total)


def _sharded_base(job: Job, accelerator: Accelerator) -> ShardedBase | None:
    """Where the launcher asks for FSDP; else every process holds the whole base."""
    if job.backbone is None or not sharding_asked() or accelerator.distributed_type is DistributedType.NO:
        return None
    return ShardedBase(job.backbone, accelerator)


def _identity(job: Job, accelerator: Accelerator) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it: else other examples are seen."""
    feed = job.feed
    return {
        "examples_a_step": feed.train.train_batch_size
        * feed.train.gradient_accumulation_steps
        * accelerator.num_processes,
        "seed": feed.seed,
        "data_seed": feed.data.data_seed,
        "scene_categories": list(feed.data.scene_categories),
        **feed.examples.identity(feed.data.dataloader_num_workers, accelerator.num_processes),
    }


def _check_same(accelerator: Accelerator, checkpoint: Path | None, step: int) -> None:
    """Every process must have found the same checkpoint: on disks of their own, nodes may hold different ones."""
    state = b"" if checkpoint is None else (checkpoint / STATE).read_bytes()
    found = gather_object([(step, zlib.crc32(state))])
    if len(set(found)) > 1:
        steps = ", ".join(str(one) for one, _ in found)
        raise InputError(
            f"the processes would go on from different checkpoints (steps {steps}): --output_dir must be one folder "
            "that all machines share"
        )


def _count_on_cpu(optimizer: torch.optim.Optimizer) -> None:
    """Where accelerate has taken AdamW's counters of a resumed run to the GPU, each step would wait for them."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].cpu()


def _check_identity(checkpoint: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    for key, value in identity.items():
        if saved.get(key, value) != value:
            of = " (train_batch_size x gradient_accumulation_steps x processes)" if key == "examples_a_step" else ""
            raise InputError(
                f"{checkpoint} was written with {key} = {saved[key]}{of}, this run has {value}; use its settings"
            )


def _rate_factor(settings: TrainConfig) -> Callable[[int], float]:
    """Multiplier of the learning rate at an optimiser step; steps are global, on any number of processes."""
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0),  # only its formula is wanted
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    return schedule.lr_lambdas[0]
