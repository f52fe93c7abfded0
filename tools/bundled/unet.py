"""Stage 3 of the bundled model: the denoiser, a Stable-Diffusion U-Net of 4.7 M parameters.

    python tools/bundled/unet.py --samples 600000
    torchrun --nproc_per_node 2 tools/bundled/unet.py --samples 600000     # two cores, half of each batch each

v-prediction on pre-encoded latents, captions dropped 10 % of the time, Muon, EMA, a rate that decays to the end.
Starts from a committed denoiser (`--weights`) with a fresh optimiser and a warm-up, or from its own checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from pathlib import Path

import numpy as np
import torch
from common import BASE, SEED, WORK, average, batches, join, log, rate, say, start
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from latents import LATENTS
from muon import Muon
from pool import POOL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

CAPTION_DROPOUT = 0.1
EXPRESSION_SHARE = 0.08  # of the captions are referring expressions, so that the denoiser knows their words
EMA_DECAY = 0.998
# t = 1000 u ** LATE: two thirds of the steps are noisier than 500, where layout and colours are decided.
LATE = 0.6
KEPT_AT = 0.8  # share of the samples after which the weights are kept aside
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
}


def build() -> UNet2DConditionModel:
    """Four levels, so that the taps bottom0..3, mid and up0..3 all exist.

    No attention on the 16x16 grid: it took half of the time, and the 8x8 grid places things well enough.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )


class Examples:
    """Latents and texts of every encoded chunk."""

    def __init__(self) -> None:
        files = sorted(LATENTS.glob("[0-9]*.npy"))
        if not files:
            raise SystemExit(f"no latents in {LATENTS}; run tools/bundled/latents.py first")
        self.latents = np.concatenate([np.load(file) for file in files]).reshape(-1, 2, 4, 16, 16)
        texts = [np.load(POOL / f"{file.stem}.npz") for file in files]
        self.captions = np.concatenate([t["captions"].reshape(-1) for t in texts])
        self.expressions = np.concatenate([t["expressions"].reshape(-1) for t in texts])

    def __len__(self) -> int:
        return len(self.captions)

    def texts(self, rows: np.ndarray, rng: np.random.Generator) -> list[str]:
        drawn = rng.random(len(rows))
        chosen = np.where(drawn < EXPRESSION_SHARE, self.expressions[rows], self.captions[rows])
        return [str(text) for text in np.where(drawn > 1 - CAPTION_DROPOUT, "", chosen)]


class Texts:
    """Token states of the frozen text encoder, each text encoded once and kept in half precision."""

    def __init__(self, device: torch.device) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
        self.encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder").to(device).eval()
        self.device, self.known = device, dict[str, Tensor]()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """[B, L, D] float32."""
        new = sorted(set(texts) - self.known.keys())
        if new:
            ids = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            states = self.encoder(ids.to(self.device)).last_hidden_state
            self.known.update(zip(new, states.half(), strict=True))
        return torch.stack([self.known[text] for text in texts]).float()


class Run:
    """Model, optimiser and moving average, and where they stand; saved together, so that a stop costs little."""

    def __init__(self, model: nn.Module, lr: float, began: str) -> None:
        self.model, self.lr, self.began = model, lr, began
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer, self.step, self.file = Muon(model, lr), 0, WORK / "unet.pt"
        if self.file.exists():
            state = torch.load(self.file, weights_only=True, map_location="cpu")
            if state.get("began", began) != began:
                raise SystemExit(f"unet: {self.file} began from {state['began']}, not {began}; remove it to begin anew")
            model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            log.info("unet: goes on at step %d", self.step)

    def update(self, loss: Tensor, lr: float) -> float:
        """One step on the loss averaged over processes; returns it. One that is not finite ends the run."""
        self.optimizer.zero_grad()
        loss.backward()
        parameters = list(self.model.parameters())
        (loss,) = average([p.grad for p in parameters], loss.detach())
        if not torch.isfinite(loss):
            raise SystemExit(f"unet: loss is {loss} at step {self.step}; last checkpoint {self.file}")
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step(lr)
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), parameters, 1 - decay)
        return float(loss)

    def save(self) -> None:
        """Write the state beside, then rename; and the moving average as a diffusers folder."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "began": self.began,
        }
        partial = self.file.with_suffix(f".{os.getpid()}")
        torch.save(state, partial)
        partial.replace(self.file)
        self.average.save_pretrained(BASE / "unet")
        DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(
            BASE / "scheduler"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=600_000)
    parser.add_argument("--batch", type=int, default=96, help="over all processes")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weights", type=Path, default=None, help="a `unet` folder whose weights to start from")
    args = parser.parse_args()
    rank, world = join()
    device = start("unet")
    model = UNet2DConditionModel.from_pretrained(args.weights) if args.weights else build()
    run = Run(model.to(device, memory_format=torch.channels_last).train(), args.lr, str(args.weights or "scratch"))
    data, texts, noising = Examples(), Texts(device), DDPMScheduler(**SCHEDULE)
    total, share = args.samples // args.batch, args.batch // world
    log.info("unet: %d pictures, %d steps, process %d of %d", len(data), total, rank + 1, world)
    clock, losses = time.time(), []
    order = batches(len(data), args.batch, SEED + run.step)
    while run.step < total:
        rows = next(order)[rank::world]
        seed = [SEED, run.step, rank]
        loss = _loss(model, data, rows, np.random.default_rng(seed), texts, noising, device)
        losses.append(run.update(loss, rate(run.step, total, run.lr, warmup=100)))
        if rank == 0 and run.step % 50 == 0:
            speed = len(losses) * share * world / (time.time() - clock)
            say("unet", run.step, run.step * args.batch, loss=float(np.mean(losses)), images_per_s=speed)
            clock, losses = time.time(), []
        if rank == 0 and run.step % 500 == 0:
            run.save()
        if rank == 0 and run.step == round(KEPT_AT * total):
            run.average.save_pretrained(WORK / "unet_before_the_end")  # is the model trained out? compare on dev
    if rank == 0:
        run.save()


def _loss(model, data, rows, rng, texts, noising, device):  # type: ignore[no-untyped-def]
    moments = torch.from_numpy(data.latents[rows]).float()
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    clean = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 1].shape, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    t = (1000 * torch.rand(len(rows), generator=generator) ** LATE).long().clamp(max=999)
    states = texts(data.texts(rows, rng))
    noisy, target = noising.add_noise(clean, noise, t), noising.get_velocity(clean, noise, t)
    noisy = noisy.to(device, memory_format=torch.channels_last)
    prediction = model(noisy, t.to(device), states).sample
    return F.mse_loss(prediction, target.to(device))


if __name__ == "__main__":
    main()
