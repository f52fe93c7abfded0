"""What the stages share: where things lie, on what device, and how a stage goes on after a stop."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, distributed, nn

WORK = Path("runs/bundled")
BASE = WORK / "base"  # the diffusers folder in the making
SEED = 20261123

log = logging.getLogger("bundled")


def start(stage: str) -> torch.device:
    """Logging to the screen and to runs/bundled/STAGE.log; the device; the seed."""
    WORK.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(WORK / f"{stage}.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.manual_seed(SEED)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def join() -> tuple[int, int]:
    """Rank of this process and their number, under torchrun or alone."""
    if "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def average(gradients: list[Tensor], *others: Tensor) -> list[Tensor]:
    """Average gradients, and scalars beside them, over all processes; one call for all of them.

    Returns the scalars; the gradients are changed in place.
    """
    if not distributed.is_initialized():
        return list(others)
    parts = [*gradients, *others]
    flat = torch.cat([part.detach().flatten() for part in parts])
    distributed.all_reduce(flat)
    means = [
        m.view_as(p)
        for m, p in zip((flat / distributed.get_world_size()).split([p.numel() for p in parts]), parts, strict=True)
    ]
    torch._foreach_copy_(gradients, means[: len(gradients)])
    return means[len(gradients) :]


def pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of row numbers, each epoch in its own order."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for at in range(0, count - size + 1, size):
            yield np.sort(order[at : at + size])
        epoch += 1


def rate(step: int, total: int, peak: float, warmup: int = 200, floor: float = 0.02) -> float:
    """Learning rate at a step: linear warm-up, then cosine down to `floor` of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


class Stage:
    """A training run that can be stopped at any time: model, optimiser, EMA and step in one file."""

    def __init__(self, name: str, model: nn.Module, lr: float, *, ema_decay: float = 0.999, weight_decay: float = 0.0):
        self.name, self.model, self.lr = name, model, lr
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75)
        self.step, self.samples = 0, 0
        self.file = WORK / f"{name}.pt"
        self._said, self._clock = 0, time.time()
        if self.file.exists():
            state = torch.load(self.file, weights_only=True, map_location="cpu")
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:
                group["fused"] = True  # whatever the file says: the arithmetic is the same
            self.ema.load_state_dict(state["ema"])
            self.ema.to(next(model.parameters()).device)
            self.step, self.samples = state["step"], state["samples"]
            log.info("%s: goes on at step %d (%d samples)", name, self.step, self.samples)

    def update(self, loss: Tensor, samples: int, lr: float) -> None:
        """One optimiser step on a loss; a loss that is not finite ends the run before it does harm."""
        if not torch.isfinite(loss):
            raise SystemExit(f"{self.name}: loss is {loss.item()} at step {self.step}; last checkpoint {self.file}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average([p.grad for p in self.model.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        self.step += 1
        self.samples += samples

    def save(self) -> None:
        """Write the state beside, then rename: a stop never leaves half a file."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
            "samples": self.samples,
        }
        partial = self.file.with_suffix(f".{os.getpid()}")
        torch.save(state, partial)
        partial.replace(self.file)

    def say(self, **figures: float) -> None:
        """Log figures with the speed since the last call, and append them to STAGE.jsonl."""
        speed = (self.samples - self._said) / max(1e-9, time.time() - self._clock)
        self._said, self._clock = self.samples, time.time()
        say(self.name, self.step, self.samples, images_per_s=speed, **figures)


def say(stage: str, step: int, samples: int, **figures: float) -> None:
    """Log a stage's figures, and append them to runs/bundled/STAGE.jsonl."""
    row = {"step": step, "samples": samples} | {key: round(value, 5) for key, value in figures.items()}
    log.info("%s %s", stage, " ".join(f"{k}={v}" for k, v in row.items()))
    with (WORK / f"{stage}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def half_weights(folder: Path) -> None:
    """Store every safetensors file below a folder in fp16: half the size, loaded back as float32 by stock loaders."""
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.rglob("*.safetensors")):
        state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
