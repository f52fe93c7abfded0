"""The adapter against the authors' release, from a checkpoint of theirs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpt_t2i.adapter.encodings import TimestepEncoding
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.official import adapter_from_official, adapter_state_from_official, sort_official
from dpt_t2i.adapter.postprocess import rank_boxes
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.types import Features

HERE = Path(__file__).parent
GOLDEN = load_file(HERE / "adapter.safetensors")


def checkpoint(tap: str) -> dict[str, torch.Tensor]:
    """The released-format checkpoint, with the projection that the tap's channels need."""
    prefix = "checkpoint."
    state = {key.removeprefix(prefix): tensor for key, tensor in GOLDEN.items() if key.startswith(prefix)}
    own = f"{tap}.own."
    state = sort_official(state).adapter
    return state | {key.removeprefix(own): tensor for key, tensor in GOLDEN.items() if key.startswith(own)}


def imported(tap: str) -> tuple[DiscriminativeAdapter, Features]:
    maps = {name: GOLDEN[f"features.{name}"] for name in tap.split("_")}
    channels = {name: feature_map.shape[1] for name, feature_map in maps.items()}
    adapter, _ = adapter_from_official(checkpoint(tap), channels, num_heads=4)
    return adapter, Features(maps=maps, timesteps=GOLDEN["timesteps"])


@pytest.mark.parametrize("tap", ["up1", "mid", "bottom0_up1", "bottom2_bottom3_mid"])
@torch.no_grad()
def test_outputs_equal_the_release(tap: str) -> None:
    adapter, features = imported(tap)
    output = adapter(features, GOLDEN["roberta.last_hidden_state"])
    ours = {
        "q_emb_matching": output.match_embeds[None],  # the release stacks decoder layers in front
        "pred_boxes": output.boxes,
        "pred_logits": output.logits,
        "proj_queries": output.query_align,
        "proj_tokens": output.token_align,
        "logit_scale": output.logit_scale,
    }
    compared = [name for name in ours if f"{tap}.{name}" in GOLDEN]
    assert {"q_emb_matching", "pred_boxes", "logit_scale"} <= set(compared)
    for name in compared:
        torch.testing.assert_close(
            ours[name], GOLDEN[f"{tap}.{name}"], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def test_timestep_encoding_equals_the_release() -> None:
    encoding = TimestepEncoding(64)
    placed, _ = adapter_state_from_official(checkpoint("up1"), {"up1": 40})
    prefix = "timestep_encoding."
    encoding.load_state_dict(
        {key.removeprefix(prefix): value for key, value in placed.items() if key.startswith(prefix)}
    )
    torch.testing.assert_close(encoding(GOLDEN["timesteps"]), GOLDEN["up1.timestep_embedding"])


def test_ranking_equals_the_release_with_its_planted_tie() -> None:
    golden = load_file(HERE / "rec_postprocess.safetensors")
    output = AdapterOutput(
        match_embeds=torch.empty(0),
        logits=golden["pred_logits"],
        boxes=golden["pred_boxes"],
        query_align=torch.empty(0),
        token_align=None,
        logit_scale=torch.ones([]),
    )
    sizes = [(width, height) for height, width in golden["target_sizes_hw"].tolist()]
    first, second = rank_boxes(output, sizes)
    assert first.queries.tolist() == [4, 9, 0, 17, 1, 7, 8, 18, 2, 11, 3, 19, 6, 10, 15, 12, 14, 13, 16, 5]
    assert second.queries.tolist() == [0, 8, 1, 16, 4, 9, 2, 13, 10, 17, 3, 14, 15, 12, 5, 11, 19, 18, 7, 6]
    for example, ranked in enumerate((first, second)):
        torch.testing.assert_close(ranked.scores, golden["scores"][example, ranked.queries])
        torch.testing.assert_close(ranked.boxes, golden["boxes_xyxy_abs"][example, ranked.queries])
