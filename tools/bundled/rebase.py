"""Between stages: a denoiser that was trained with one text encoder starts to learn with another.

    python tools/bundled/rebase.py

Of the new encoder's token states a least-squares map to the old ones is taken, and folded into the keys and values of
the denoiser's cross-attention: W old = W (M new). So training goes on from about what the denoiser can, not from
noise; what the map does not explain it has to learn. Old are the package's parts, new is `runs/bundled/base`; the
result lies in `runs/bundled/rebased`, for `unet.py --weights`.
"""

from __future__ import annotations

import torch
from common import BASE, WORK, log, start
from diffusers import UNet2DConditionModel
from pack import TARGET
from pool import read_pool
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

TEXTS = 6000


@torch.no_grad()
def main() -> None:
    start("rebase")
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    pool = read_pool(most=1)
    texts = [*dict.fromkeys([*pool.captions.flat, *pool.expressions.flat])][:TEXTS]
    texts += [""] * (TEXTS // 30)  # guidance needs it kept well
    ids = tokenizer([str(t) for t in texts], padding="max_length", truncation=True, return_tensors="pt").input_ids
    old, new = (
        torch.cat([encoder(part).last_hidden_state for part in ids.split(200)]).flatten(0, 1).double()
        for encoder in (CLIPTextModel.from_pretrained(root / "text_encoder").eval() for root in (TARGET / "base", BASE))
    )
    change = least_squares(new, old)
    missed = (new @ change - old).square().sum() / (old - old.mean(0)).square().sum()
    log.info("rebase: %.3f of the old states' variance is not in a linear map of the new", missed)
    denoiser = UNet2DConditionModel.from_pretrained(TARGET / "base/unet")
    for name, layer in denoiser.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layer.weight.copy_(layer.weight.double() @ change.T)
    denoiser.save_pretrained(WORK / "rebased")


def least_squares(new: Tensor, old: Tensor) -> Tensor:
    """The M [D, D] with the smallest |new M - old|, of states [N, D] each; a little ridge for directions never seen."""
    gram = new.T @ new
    return torch.linalg.solve(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=new.dtype), new.T @ old)


if __name__ == "__main__":
    main()
