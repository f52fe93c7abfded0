"""The goldens' training batch as our own `Encoded` and `Draw`, and the release's names of our parameters."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from dpt_t2i.adapter.grounding_text import GroundingText, load_grounding_text
from dpt_t2i.adapter.official import adapter_state_from_official
from dpt_t2i.backbones.lora import place_lora
from dpt_t2i.config import DenoiseConfig, ItmRecConfig
from dpt_t2i.objectives.types import GroundingTargets, Losses
from dpt_t2i.training.denoising import Draw
from dpt_t2i.training.encode import Encoded
from dpt_t2i.training.objective import ProbeObjective, TuneObjective, weights_of
from tests.parity.golden import SHARED, adapter, backbone, checkpoint, model, numbers, tensors

BOXES = 5.0  # of the batch: 1, 1, 2, 1
OURS = {
    "loss_i2t": "loss_contrastive_i2t",
    "loss_t2i": "loss_contrastive_t2i",
    "loss_ce": "loss_ce",
    "loss_bbox": "loss_bbox",
    "loss_giou": "loss_giou",
    "loss_align": "loss_contrastive_align",
    "loss_mse": "loss_mse",
}


@cache
def expressions() -> GroundingText:
    """The referring expressions through the golden RoBERTa."""
    encoder = load_grounding_text(str(SHARED / "roberta"), torch.device("cpu"))
    return encoder([target["caption"] for target in numbers("losses")["targets"]])


def golden_targets(positive_map: Tensor | None = None) -> GroundingTargets:
    golden, counts = tensors("losses"), numbers("losses")["boxes_per_sample"]
    rows = golden["batch.positive_map"] if positive_map is None else positive_map
    return GroundingTargets(golden["batch.boxes"].split(counts), rows.split(counts))


def encoded(targets: GroundingTargets | None = None, mask: Tensor | None = None) -> Encoded:
    """The release's batch. By default with its own oddities: 0/1 token maps, and padding counted as text."""
    golden, records = tensors("losses"), numbers("losses")["targets"]
    columns = [[record[key] for record in records] for key in ("caption_whole_image", "neg", "rand", "caption")]
    texts = list(dict.fromkeys(["", *(text for column in columns for text in column)]))
    rows = [torch.tensor([texts.index(text) for text in column]) for column in columns]
    text, always = expressions(), torch.ones(len(records), dtype=torch.bool)
    return Encoded(
        latents=torch.cat([golden[f"batch.{name}_latent"] for name in ("img", "img_neg", "img_rand")]),
        text=model().encode_text(texts),
        caption=rows[0],
        hard_caption=rows[1],
        random_caption=rows[2],
        expression=rows[3],
        null=torch.tensor([0]),
        has_hard_image=always,
        hard_pair=always,
        has_hard_caption=always,
        grounding_tokens=text.tokens,
        grounding_mask=torch.ones_like(text.mask) if mask is None else mask,
        targets=targets or golden_targets(),
        records=(0, 1, 2, 3),
    )


def draw(dropped: tuple[int, ...] = ()) -> Draw:
    golden = tensors("losses")
    drop = torch.zeros(4, dtype=torch.bool)
    drop[list(dropped)] = True
    return Draw(golden["noise"], golden["timesteps"], drop)


def objective(stage: int, snr_gamma: float | None = None, cut: str | None = None) -> ProbeObjective | TuneObjective:
    """Ready to train: stage 1 without LoRA, stage 2 with the golden one; dropout off, as in the goldens."""
    batch_encoder = backbone(lora=False)
    head = adapter()
    head.requires_grad_(True)
    taps = batch_encoder.parse_taps("up1")
    if stage == 1:
        return ProbeObjective(batch_encoder, head, taps, ItmRecConfig())
    place_lora(batch_encoder, checkpoint().lora, "golden", trainable=True)
    behind = None if cut is None else batch_encoder.taps[cut]
    return TuneObjective(batch_encoder, head, taps, ItmRecConfig(), DenoiseConfig(snr_gamma=snr_gamma), behind)


def losses_of(terms: dict[str, Tensor]) -> Losses:
    return Losses(terms, weights_of(ItmRecConfig(), DenoiseConfig()))


def released_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters under the names of the release's checkpoint."""
    _, table = adapter_state_from_official(checkpoint().adapter, {"up1": 40})
    theirs = {f"adapter.{row.note}": row.key for row in table}
    found = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".lora_" in name:
            key = (
                name.replace("denoiser.", "unet.", 1)
                .replace(".to_out.0.", ".to_out.")
                .replace(".to_", ".processor.to_")
            )
            found[key.replace(".lora_A.dpt", "_lora.down").replace(".lora_B.dpt", "_lora.up")] = parameter
        else:
            found[theirs[name]] = parameter
    return found


def group_of(name: str) -> str:
    """The goldens' parameter groups."""
    if name.startswith("unet."):
        return "lora.down" if ".down." in name else "lora.up"
    if name.startswith("transformer."):
        return ".".join(name.split(".")[:2])
    return name.split(".")[0]
