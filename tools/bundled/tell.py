"""After the denoiser: the text encoder's token states learn to say what stands where, in directions not read so far.

    python tools/bundled/tell.py

The pooled vector tells sides, and the states of the single tokens, which a denoiser reads, hardly do. Here the last
word's state and those of the padding behind a caption learn to name them (`slots.py`). What the committed denoiser
makes of the states, its keys and values, and the pooled vector, which the adapters compare with, are held: so the base
draws as before, and what it could read more of is there for stage 2, and for its control, to learn.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from common import BASE, SEED, Stage, log, rate, start
from diffusers import UNet2DConditionModel
from pack import TARGET
from pool import read_pool
from slots import NAMES, naming, slots_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

SIDED = 0.625  # of a batch's texts name a side
EMPTY = 4  # texts of a batch are empty: guidance needs them kept
HOLD = 30.0
BEHIND = 2  # padding tokens that name, of each text


class Telling(nn.Module):
    """The encoder, and a layer that names, whose rows have length one: what is named must be large in the states."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder, self.names = encoder, nn.Linear(encoder.config.hidden_size, NAMES)

    def name(self, states: Tensor) -> Tensor:
        return F.linear(states, F.normalize(self.names.weight, dim=1), self.names.bias)


def moved(change: Tensor, before: Tensor) -> Tensor:
    """Mean square of a change [..., D], as a share of the variance of what was before."""
    return change.square().sum(-1).mean() / (before - before.flatten(0, -2).mean(0)).square().sum(-1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    device = start("tell")
    tokenizer, pool = CLIPTokenizer.from_pretrained(BASE / "tokenizer"), read_pool()
    slots = slots_of(pool.captions).reshape(-1, 4, 2)
    texts = np.concatenate([pool.captions.reshape(-1), pool.expressions.reshape(-1)])
    slots = np.concatenate([slots, np.full_like(slots, -1)])  # expressions are held, and not asked
    ids = np.array(tokenizer(texts.tolist(), padding="max_length", truncation=True).input_ids)
    sided = (slots[..., 0] != -1).any(axis=1)
    sided, others = np.flatnonzero(sided), np.flatnonzero(~sided)
    empty = np.full((EMPTY, ids.shape[1]), tokenizer.pad_token_id)
    empty[:, 0] = tokenizer.bos_token_id
    before = CLIPTextModel.from_pretrained(TARGET / "base/text_encoder", dtype=torch.float32).to(device).eval()
    model = Telling(copy.deepcopy(before)).to(device).train()
    reading = _reading().to(device)
    stage = Stage("tell", model, lr=args.lr)
    rng = np.random.default_rng([SEED, 7, stage.step])  # with other texts after a stop
    many = int(SIDED * args.batch)
    while stage.step < args.steps:
        rows = np.concatenate([rng.choice(sided, many), rng.choice(others, args.batch - many - EMPTY)])
        tokens = torch.from_numpy(np.concatenate([ids[rows], empty])).to(device)
        named = torch.from_numpy(np.concatenate([slots[rows], np.full((EMPTY, 4, 2), -1)])).to(device)
        states = model.encoder(tokens).last_hidden_state
        with torch.no_grad():
            old = before(tokens).last_hidden_state
        each, ends = torch.arange(len(tokens), device=device), (tokens == tokenizer.eos_token_id).int().argmax(1)
        last = tokens.shape[1] - 1
        side = naming(model.name(states[each, ends - 1]), named)
        for _ in range(BEHIND):
            place = ends + 1 + (torch.rand(len(tokens), device=device) * (last - ends)).long()
            inside = place <= last
            side = side + naming(model.name(states[each, place.clamp(max=last)])[inside], named[inside])
        read = moved((states - old) @ reading, old @ reading)
        pooled = moved(states[each, ends] - old[each, ends], old[each, ends])
        loss = side / (1 + BEHIND) + HOLD * (read + pooled)
        stage.update(loss, len(tokens), rate(stage.step, args.steps, stage.lr, warmup=100))
        if stage.step % 100 == 0:
            stage.say(side=side.item() / (1 + BEHIND), read=read.item(), pooled=pooled.item())
            stage.save()
    stage.ema.copy_to(model.parameters())
    model.encoder.save_pretrained(BASE / "text_encoder")
    log.info("tell: %s", BASE / "text_encoder")


def _reading() -> Tensor:
    """R [D, D] with |x R| = |W x|, where W stacks the keys and values of all of the denoiser's cross-attention."""
    denoiser = UNet2DConditionModel.from_pretrained(TARGET / "base/unet")
    layers = [layer for name, layer in denoiser.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    weight = torch.cat([layer.weight.detach().float() for layer in layers])
    values, vectors = torch.linalg.eigh(weight.T @ weight)
    return vectors * values.clamp(min=0).sqrt()


if __name__ == "__main__":
    main()
