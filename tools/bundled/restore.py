"""Go on from the committed weights on a machine that has no `runs/bundled`.

    python tools/bundled/restore.py

Finished parts (autoencoder, tokenizer, text encoder, image encoder, denoiser) come from the package data, so that
`latents.py` and `unet.py --weights src/dpt_t2i/bundled/base/unet` can run after `pool.py` alone. So does stage 1's
adapter. What the package does not carry comes from `tools/bundled/kept`: the second control's LoRA, hours of training
that whoever measures DPT beside it need not repeat.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from common import BASE, WORK, log, start
from pack import PROJECTION, TARGET
from safetensors.torch import load_file

KEPT = Path(__file__).parent / "kept"  # run folder's name -> its weights


def main() -> None:
    start("restore")
    for part in ("vae", "tokenizer", "text_encoder", "unet", "scheduler"):
        _give(TARGET / "base" / part, BASE / part)
    _give(TARGET / "image_encoder", WORK / "image_encoder")
    projection = load_file(TARGET / "image_encoder" / PROJECTION)["text_projection.weight"]
    torch.save({"weight": projection.float()}, WORK / "text_projection.pt")
    _give(TARGET / "base/dpt/probe/adapter", WORK / "probe/adapter")
    for run in sorted(KEPT.iterdir()):
        _give(run, WORK / run.name)


def _give(source: Path, target: Path) -> None:
    """Copy a finished part. They belong together: one that is there stops the command."""
    if target.exists():
        raise SystemExit(f"restore: {target} is there; move it away first")
    shutil.copytree(source, target)
    log.info("restore: %s", target)


if __name__ == "__main__":
    main()
