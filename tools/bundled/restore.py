"""Go on from the committed weights on a machine that has no `runs/bundled`.

    python tools/bundled/restore.py
    python tools/bundled/restore.py --encoders tools/bundled/next     # younger ones than the package's

Finished parts (autoencoder, tokenizer, text encoder, image encoder, denoiser) come from the package data, so that
`latents.py` and `unet.py --weights src/dpt_t2i/bundled/base/unet` can run after `pool.py` alone.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from common import BASE, WORK, log, start
from pack import PROJECTION, TARGET
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoders", type=Path, default=TARGET, help="folder with text and image encoder")
    encoders = parser.parse_args().encoders
    start("restore")
    _give(encoders / "base/text_encoder", BASE / "text_encoder")
    _give(encoders / "image_encoder", WORK / "image_encoder")
    projection = load_file(encoders / "image_encoder" / PROJECTION)["text_projection.weight"]
    torch.save({"weight": projection.float()}, WORK / "text_projection.pt")
    for part in ("vae", "tokenizer", "unet", "scheduler"):
        if not (BASE / part).exists():
            _give(TARGET / "base" / part, BASE / part)
    if encoders != TARGET and (probe := encoders / "base/dpt/probe/adapter").is_dir():
        _give(probe, WORK / "probe/adapter")


def _give(source: Path, target: Path) -> None:
    """Copy a finished part. Encoders, projection and adapter belong together: one that is there stops the command."""
    if target.exists():
        raise SystemExit(f"restore: {target} is there; move it away first")
    shutil.copytree(source, target)
    log.info("restore: %s", target)


if __name__ == "__main__":
    main()
