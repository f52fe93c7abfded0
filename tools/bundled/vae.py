"""Stage 1 of the bundled model: the autoencoder (64 px -> 16x16x4 latents).

python tools/bundled/vae.py --samples 60000
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import BASE, SEED, Stage, batches, log, pixels, rate, start
from diffusers import AutoencoderKL
from pool import read_pool
from torch.nn import functional as F

KL_WEIGHT = 2e-5  # per latent element; ten times more, and colours were never encoded
MSE_WEIGHT = 4.0  # a wrong colour on a small thing must outweigh the texture of the ground
CROP, CROP_SHARE = 32, 0.5  # the first half of the work is done on crops: four times as many, for the same price


def build() -> AutoencoderKL:
    """Small, /4, without attention: shapes and flat colours need no more."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=None, help="read only the first chunks of the pool")
    args = parser.parse_args()
    device = start("vae")
    images = read_pool(most=args.chunks).images.reshape(-1, 64, 64, 3)
    model = build().to(device).train()
    stage, total = Stage("vae", model, lr=2e-3), args.samples // args.batch
    while stage.step < total:
        truth = pixels(_draw(images, stage.step, total, args.batch), device)
        posterior = model.encode(truth).latent_dist
        output = model.decode(posterior.sample()).sample
        error = F.l1_loss(output, truth) + MSE_WEIGHT * F.mse_loss(output, truth)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        stage.update(error + KL_WEIGHT * kl, args.batch, rate(stage.step, total, stage.lr))
        if stage.step % 250 == 0:
            stage.say(error=error.item(), kl=kl.item(), mse=F.mse_loss(output, truth).item())
        if stage.step % 1000 == 0:
            stage.save()
    stage.save()
    stage.ema.copy_to(model.parameters())
    finish(model.eval(), images, device)


def _draw(images: np.ndarray, step: int, total: int, batch: int) -> np.ndarray:
    """Whole pictures, or in the first half of the run four times as many random crops."""
    rng = np.random.default_rng([SEED, step])
    if step >= CROP_SHARE * total:
        return images[np.sort(rng.integers(len(images), size=batch))]
    rows = np.sort(rng.integers(len(images), size=4 * batch))
    corners = rng.integers(images.shape[1] - CROP + 1, size=(4 * batch, 2))
    return np.stack([images[r, y : y + CROP, x : x + CROP] for r, (y, x) in zip(rows, corners, strict=True)])


@torch.no_grad()
def finish(model: AutoencoderKL, images, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    """Set the scaling factor so that latents have unit variance, and save."""
    rows = next(batches(len(images), min(2000, len(images)), SEED + 1))
    parts = [model.encode(pixels(images[rows[i : i + 50]], device)).latent_dist.mean for i in range(0, len(rows), 50)]
    scale = 1 / torch.cat(parts).std().item()
    model.register_to_config(scaling_factor=round(scale, 4))
    model.save_pretrained(BASE / "vae")
    log.info("vae: scaling factor %.4f, saved to %s", scale, BASE / "vae")


if __name__ == "__main__":
    main()
