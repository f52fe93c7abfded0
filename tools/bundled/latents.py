"""Between stages: encode the pool with the finished autoencoder, chunk by chunk.

python tools/bundled/latents.py
"""

from __future__ import annotations

import os

import numpy as np
import torch
from common import BASE, WORK, log, pixels, start
from diffusers import AutoencoderKL
from pool import POOL

LATENTS = WORK / "latents"


@torch.no_grad()
def main() -> None:
    device = start("latents")
    vae = AutoencoderKL.from_pretrained(BASE / "vae").to(device).eval()
    LATENTS.mkdir(exist_ok=True)
    for file in sorted(POOL.glob("[0-9]*.npz")):
        target = LATENTS / file.with_suffix(".npy").name
        if target.exists():
            continue
        images = np.load(file)["images"].reshape(-1, 64, 64, 3)
        parts = []
        for at in range(0, len(images), 32):
            posterior = vae.encode(pixels(images[at : at + 32], device)).latent_dist
            both = torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor
            parts.append(both.half().cpu().numpy())
        partial = LATENTS / f".{file.stem}.{os.getpid()}.npy"
        np.save(partial, np.concatenate(parts).reshape(-1, 2, 2, 4, 16, 16))  # example, picture, mean/std, latent
        partial.rename(target)
        log.info("latents: %s", target)


if __name__ == "__main__":
    main()
