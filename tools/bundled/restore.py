"""Go on from the committed weights on a machine that has no `runs/bundled`.

    python tools/bundled/restore.py

Finished parts (autoencoder, tokenizer, text encoder, image encoder) come from the package data, so that `latents.py`
and `unet.py --weights src/dpt_t2i/bundled/base/unet` can run after `pool.py` alone.
"""

from __future__ import annotations

import shutil

import torch
from common import BASE, WORK, log, start
from pack import PROJECTION, TARGET
from safetensors.torch import load_file


def main() -> None:
    start("restore")
    for part in ("vae", "tokenizer", "text_encoder", "scheduler"):
        if not (BASE / part).exists():
            shutil.copytree(TARGET / "base" / part, BASE / part)
            log.info("restore: %s", BASE / part)
    if not (WORK / "image_encoder").exists():
        shutil.copytree(TARGET / "image_encoder", WORK / "image_encoder")
    projection = load_file(TARGET / "image_encoder" / PROJECTION)["text_projection.weight"]
    torch.save({"weight": projection.float()}, WORK / "text_projection.pt")


if __name__ == "__main__":
    main()
