"""Stage 3 of the bundled model: the denoiser, a Stable-Diffusion U-Net of 4.7 M parameters.

    python tools/bundled/unet.py --samples 600000

v-prediction on pre-encoded latents, captions dropped 10 % of the time, EMA, a rate that decays to the end.
Starts from a committed denoiser (`--start`) with a fresh optimiser and a warm-up, or from its own checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import BASE, SEED, Stage, batches, log, rate, start
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from latents import LATENTS
from pool import POOL
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

CAPTION_DROPOUT = 0.1
EXPRESSION_SHARE = 0.08  # of the captions are referring expressions, so that the denoiser knows their words
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
    """Latents and texts of every encoded chunk; chunks that appear later join at the next epoch."""

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=600_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--start", type=Path, default=None, help="a `unet` folder whose weights to start from")
    args = parser.parse_args()
    device = start("unet")
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder").to(device).eval()
    noising = DDPMScheduler(**SCHEDULE)
    model = UNet2DConditionModel.from_pretrained(args.start) if args.start else build()
    model.to(device).train()
    stage, total = Stage("unet", model, lr=args.lr, ema_decay=0.9995), args.samples // args.batch
    while stage.step < total:
        data = Examples()
        log.info("unet: %d pictures", len(data))
        order = batches(len(data), args.batch, SEED + stage.step)
        for _ in range(min(total - stage.step, len(data) // args.batch)):
            rows, rng = next(order), np.random.default_rng([SEED, stage.step])
            generator = torch.Generator().manual_seed(SEED + stage.step)
            loss = _loss(model, data, rows, rng, generator, tokenizer, encoder, noising, device)
            stage.update(loss, len(rows), rate(stage.step, total, stage.lr))
            if stage.step % 200 == 0:
                stage.say(loss=loss.item())
            if stage.step % 1000 == 0:
                stage.save()
                write(stage, model)
    stage.save()
    write(stage, model)


def _loss(model, data, rows, rng, generator, tokenizer, encoder, noising, device):  # type: ignore[no-untyped-def]
    moments = torch.from_numpy(data.latents[rows]).float()
    clean = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 1].shape, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(0, 1000, (len(rows),), generator=generator)
    ids = tokenizer(data.texts(rows, rng), padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        states = encoder(ids.to(device)).last_hidden_state
    noisy, target = noising.add_noise(clean, noise, t), noising.get_velocity(clean, noise, t)
    prediction = model(noisy.to(device), t.to(device), states).sample
    return F.mse_loss(prediction, target.to(device))


def write(stage: Stage, model: UNet2DConditionModel) -> None:
    """Save the EMA weights as a diffusers folder, and the schedule beside them."""
    stage.ema.store(model.parameters())
    stage.ema.copy_to(model.parameters())
    model.save_pretrained(BASE / "unet")
    stage.ema.restore(model.parameters())
    DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(
        BASE / "scheduler"
    )


if __name__ == "__main__":
    main()
