"""Stage 2 of the bundled model: tokenizer, text encoder and image encoder, trained against each other as CLIP is.

    python tools/bundled/text.py --samples 200000
    python tools/bundled/text.py --samples 600000 --weights src/dpt_t2i/bundled     # go on from committed encoders
    ... --weights src/dpt_t2i/bundled --hold 10     # and keep what a denoiser that learned with them reads

Both captions of an example (true, and hard negative) and both pictures stand in one batch, so that the pooled vector
has to tell word order and who wears which colour. The text encoder is frozen afterwards.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from common import BASE, SEED, WORK, Stage, batches, join, log, pixels, rate, start
from pack import PROJECTION
from pool import Pool, read_pool
from safetensors.torch import load_file
from slots import NAMES, naming, slots_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

MAX_LENGTH = 32
EXPRESSION_SHARE = 0.15  # of the pairs are a referring expression instead of a caption
HARD_WEIGHT = 1.0  # of telling an example's own two captions (pictures) apart, beside the whole batch's
SIDES = ("flip_relation", "turn_relation", "swap_objects")  # the rules that are hardest to tell
SIDES_SHOWN = 3  # times as often as the others
APART = 0.5  # cosine of a caption's pooled vector with its hard negative's, above which it costs
APART_WEIGHT = 5.0
SLOT_SCALE = 10.0  # of the unit embeddings that name
SLOT_WEIGHT = 0.5  # of naming what stands left, right, above and below


def train_tokenizer(captions: np.ndarray) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges come from our captions; every byte has a token, so any text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(captions.tolist(), trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [a + b for a, b in merges if a + b not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH, pad_token="<|endoftext|>")


class Pair(nn.Module):
    """Text and image encoder with their projections and the scale between them."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=512,
                projection_dim=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=MAX_LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.image = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=96,
                intermediate_size=384,
                projection_dim=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=64,
                patch_size=8,
            )
        )
        self.text_projection = nn.Linear(128, 128, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07)))
        self.slots = nn.Linear(128, NAMES)

    def load(self, package: Path) -> None:
        """Take the encoders and the projection of package data (`src/dpt_t2i/bundled`)."""
        self.text = CLIPTextModel.from_pretrained(package / "base/text_encoder", dtype=torch.float32)
        self.image = CLIPVisionModelWithProjection.from_pretrained(package / "image_encoder", dtype=torch.float32)
        state = load_file(package / "image_encoder" / PROJECTION)
        self.text_projection.weight.data = state["text_projection.weight"].float()

    def embed_text(self, ids: Tensor) -> Tensor:
        return self.project(self.text(ids).pooler_output)

    def project(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.text_projection(pooled), dim=-1)

    def embed_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image(images).image_embeds, dim=-1)


def contrast(text: Tensor, image: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's loss over a batch [2B, D] that holds B examples and their B hard negatives, plus the hard pairs alone."""
    logits = scale * image @ text.T
    truth = torch.arange(len(logits), device=logits.device)
    batch = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    twin = truth.roll(len(truth) // 2)
    own, near_text, near_image = logits[truth, truth], logits[truth, twin], logits[twin, truth]
    hard = (F.softplus(near_text - own) + F.softplus(near_image - own)).mean() / 2
    return batch, hard


def crowded(pooled: Tensor) -> Tensor:
    """How near the pooled vectors [2B, D] of texts and of their hard negatives are. Stage 1 compares what it reads with
    these, not with their projections, and learns slowly what lies close. Referring expressions count as captions do."""
    return (F.cosine_similarity(*pooled.chunk(2)) - APART).clamp(min=0).square().mean()


def moved(states: Tensor, before: Tensor, pooled: Tensor) -> Tensor:
    """How far token states [B, L, D] are from those before, as a share of the variance of these; the state at `pooled`
    [B] is left out, for it has to tell more than it did."""
    rest = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    rest[torch.arange(len(states), device=states.device), pooled] = False
    change, spread = (states - before)[rest], (before - before.mean((0, 1)))[rest]
    return change.square().sum() / spread.square().sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument(
        "--batch",
        type=int,
        default=64,
        help="examples; each brings two pictures and two captions; "
        "on several processes each has so many, and contrasts them among themselves",
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weights", type=Path, default=None, help="package data whose encoders to start from")
    parser.add_argument("--hold", type=float, default=0.0, help="weight of keeping the token states of `weights`")
    args = parser.parse_args()
    if args.hold and args.weights is None:
        parser.error("--hold keeps the token states of --weights; name some")
    rank, world = join()
    device = start("text")
    pool = read_pool()
    if rank == 0:
        _provide_tokenizer(pool, args.weights)
    if world > 1:
        distributed.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    ids, referring = _tokenize(tokenizer, pool.captions), _tokenize(tokenizer, pool.expressions)
    slots = slots_of(pool.captions)
    model = Pair(tokenizer)
    if args.weights:
        model.load(args.weights)
    before = copy.deepcopy(model.text).to(device).requires_grad_(False).eval() if args.hold else None
    model.to(device).train()
    held = len(pool.images) - 1000  # the last examples measure, and are not trained on
    sides = np.flatnonzero(np.isin(pool.rules[:held], SIDES))
    shown = np.concatenate([np.arange(held), *[sides] * (SIDES_SHOWN - 1)])
    mix = np.random.default_rng([SEED + 3, rank])
    stage = Stage("text", model, lr=args.lr, weight_decay=0.05)
    total, order = args.samples // (2 * args.batch * world), batches(len(shown), args.batch * world, SEED + stage.step)
    while stage.step < total:
        rows = shown[next(order)][rank::world]
        referred = mix.random((len(rows), 1, 1)) < EXPRESSION_SHARE
        texts = np.where(referred, referring[rows], ids[rows])
        named = torch.from_numpy(_both(np.where(referred[..., None], -1, slots[rows]))).to(device)
        images, tokens = _both(pool.images[rows]), _both(texts)
        if before is None:
            tokens = _trim(tokens, tokenizer.eos_token_id)
        scale = model.logit_scale.exp().clamp(max=100)
        read = model.text(known := torch.from_numpy(tokens).to(device))
        text, image = model.project(read.pooler_output), model.embed_image(pixels(images, device))
        batch, hard = contrast(text, image, scale)
        side = naming(SLOT_SCALE * model.slots(text), named) + naming(SLOT_SCALE * model.slots(image), named)
        crowd, kept = crowded(read.pooler_output), batch.new_zeros(())
        if before is not None:
            ends = (known == tokenizer.eos_token_id).int().argmax(dim=1)
            kept = moved(read.last_hidden_state, before(known).last_hidden_state, ends)
        stage.update(
            batch + HARD_WEIGHT * hard + SLOT_WEIGHT * side + APART_WEIGHT * crowd + args.hold * kept,
            len(images) * world,
            rate(stage.step, total, stage.lr),
        )
        if rank == 0 and stage.step % 100 == 0:
            stage.say(
                batch=batch.item(),
                hard=hard.item(),
                side=side.item(),
                crowd=crowd.item(),
                moved=kept.item(),
                scale=scale.item(),
            )
        if rank == 0 and stage.step % 500 == 0:
            stage.save()
            log.info("text: held-out hard accuracy %s", accuracy(model, pool, ids, held, device))
    if rank:
        return
    stage.save()
    stage.ema.copy_to(model.parameters())
    model.eval()
    figures = accuracy(model, pool, ids, held, device)
    log.info("text: final held-out hard accuracy %s", figures)
    (WORK / "text.json").write_text(json.dumps(figures))
    model.text.save_pretrained(BASE / "text_encoder")
    model.image.save_pretrained(WORK / "image_encoder")
    torch.save(model.text_projection.state_dict(), WORK / "text_projection.pt")


@torch.no_grad()
def accuracy(model: Pair, pool: Pool, ids: np.ndarray, first: int, device: torch.device) -> dict[str, float]:
    """Share of held-out examples whose own caption (picture) scores above its hard negative; chance 0.5.

    All of them (`text`, `image`), and the caption side by the rule that made the negative.
    """
    text_side, image_side = [], []
    for at in range(first, len(pool.images), 100):
        rows = slice(at, at + 100)
        text = model.embed_text(torch.from_numpy(_both(ids[rows])).to(device)).unflatten(0, (2, -1))
        image = model.embed_image(pixels(_both(pool.images[rows]), device)).unflatten(0, (2, -1))
        own = (text[0] * image[0]).sum(-1)
        text_side.append(own > (text[1] * image[0]).sum(-1))
        image_side.append(own > (text[0] * image[1]).sum(-1))
    text, rules = torch.cat(text_side).float().cpu(), pool.rules[first:]
    by_rule = {str(rule): text[torch.from_numpy(rules == rule)].mean().item() for rule in np.unique(rules)}
    return {"text": text.mean().item(), "image": torch.cat(image_side).float().mean().item(), **by_rule}


def _provide_tokenizer(pool: Pool, weights: Path | None) -> None:
    """That of the weights to start from, else one that is trained here; none where one is there."""
    if (BASE / "tokenizer").exists():
        return
    if weights is not None:
        shutil.copytree(weights / "base/tokenizer", BASE / "tokenizer")
        return
    words = np.concatenate([pool.captions.reshape(-1), pool.expressions.reshape(-1)])
    train_tokenizer(words).save_pretrained(BASE / "tokenizer")


def _tokenize(tokenizer: CLIPTokenizer, texts: np.ndarray) -> np.ndarray:
    """Texts [N, 2] -> token ids [N, 2, 32]."""
    flat = tokenizer(texts.reshape(-1).tolist(), padding="max_length", max_length=MAX_LENGTH, truncation=True)
    return np.array(flat.input_ids).reshape(*texts.shape, MAX_LENGTH)


def _both(rows: np.ndarray) -> np.ndarray:
    """[B, 2, ...] -> [2B, ...], the examples first and then their negatives in the same order."""
    return np.concatenate([rows[:, 0], rows[:, 1]])


def _trim(ids: np.ndarray, eos: int) -> np.ndarray:
    """Cut padding that no text of the batch needs: attention is causal, and pooling is at the first EOS."""
    return ids[:, : int((ids == eos).argmax(axis=1).max()) + 1]


if __name__ == "__main__":
    main()
