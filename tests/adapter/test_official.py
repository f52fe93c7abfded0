"""Importing a released checkpoint: every key is taken, ignored with a reason, or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpt_t2i.adapter.model import module_name
from dpt_t2i.adapter.official import adapter_from_official, adapter_state_from_official, sort_official
from dpt_t2i.backbones.types import Features
from dpt_t2i.errors import InputError

PREFIX = "checkpoint."
WHOLE = {
    key.removeprefix(PREFIX): tensor
    for key, tensor in load_file(Path(__file__).parents[1] / "parity" / "adapter.safetensors").items()
    if key.startswith(PREFIX)
}
CHECKPOINT = sort_official(WHOLE).adapter
UP1 = {"up1": 40}


def test_every_key_is_accounted_for_once() -> None:
    adapter, table = adapter_from_official(CHECKPOINT, UP1, num_heads=4)
    assert [row.key for row in table] == list(CHECKPOINT)
    assert {row.action for row in table} == {"taken"}
    assert sorted(row.note for row in table) == sorted(adapter.state_dict())


def test_sizes_are_read_off_the_tensors() -> None:
    adapter, _ = adapter_from_official(CHECKPOINT, UP1, num_heads=4)
    config = adapter.config
    assert (config.hidden_dim, config.dim_feedforward, config.enc_layers, config.dec_layers) == (64, 128, 1, 1)
    assert (config.num_queries_matching, config.num_queries_rec, config.contrastive_dim) == (10, 20, 32)
    assert (config.num_token_classes, adapter.pooled_dim, adapter.text_dim) == (255, 64, 48)
    assert not config.normalize_features and not adapter.training


def test_logit_scale_is_restored() -> None:
    """The release's own loader forgets it (it walks submodules only)."""
    adapter, _ = adapter_from_official(CHECKPOINT, UP1, num_heads=4)
    assert adapter.logit_scale.exp().item() == pytest.approx(20.0)


def test_a_checkpoint_is_sorted_into_its_parts() -> None:
    roberta = {"text_encoder.pooler.dense.bias": torch.zeros(2), "text_encoder.embeddings.position_ids": torch.ones(2)}
    parts = sort_official(WHOLE | roberta)
    assert parts.adapter.keys() == CHECKPOINT.keys() and len(parts.lora) == len(WHOLE) - len(CHECKPOINT) == 1
    assert list(parts.grounding_text) == ["pooler.dense.bias"]
    assert parts.buffers == ("text_encoder.embeddings.position_ids",)


def test_names_of_a_distributed_wrapper_are_taken() -> None:
    wrapped = sort_official({f"module.{key}": tensor for key, tensor in WHOLE.items()})
    assert wrapped.adapter.keys() == CHECKPOINT.keys() and len(wrapped.lora) == 1
    with pytest.raises(InputError, match="comes twice"):
        sort_official(WHOLE | {"module.logit_scale": torch.zeros(())})


def test_several_taps_cut_the_projection() -> None:
    placed, table = adapter_state_from_official(CHECKPOINT, {"bottom0": 16, "up0": 24})
    weight = torch.cat([placed["projections.bottom0.weight"], placed["projections.up0.weight"]], dim=1)
    assert torch.equal(weight, CHECKPOINT["input_proj.weight"])
    assert torch.equal(placed["projections.bottom0.bias"], CHECKPOINT["input_proj.bias"])
    assert "projections.up0.bias" not in placed  # one projection has one bias
    notes = {row.key: row.note for row in table}
    assert notes["input_proj.weight"] == "projections.bottom0.weight, projections.up0.weight"


def test_a_tap_by_its_path_is_placed_as_the_adapter_names_it() -> None:
    adapter, _ = adapter_from_official(CHECKPOINT, {"up_blocks.1": 40}, num_heads=4)
    assert list(adapter.projections) == [module_name("up_blocks.1")]


def fused_checkpoint() -> dict[str, torch.Tensor]:
    """As `all-12-6` on a denoiser of three maps: 16, 24 and 40 channels, projected to 12."""
    generator = torch.Generator().manual_seed(0)
    state = CHECKPOINT | {"input_proj.weight": torch.randn(64, 12, 1, 1, generator=generator)}
    for index, channels in enumerate((16, 24, 40)):
        state[f"fusion_proj.{index}.weight"] = torch.randn(12, channels, 1, 1, generator=generator)
        state[f"fusion_proj.{index}.bias"] = torch.randn(12, generator=generator)
    return state


def test_a_fused_feature_is_the_releases() -> None:
    """Maps resized to nearest 6 x 6, each through its own projection, summed, then the one projection."""
    state, taps = fused_checkpoint(), {"bottom0": 16, "mid": 24, "up0": 40}
    adapter, table = adapter_from_official(state, taps, fusion=(12, 6), num_heads=4)
    assert len(table) == len(state) and adapter.tap_text == "bottom0_mid_up0-12-6"
    shapes = {"bottom0": (16, 12, 12), "mid": (24, 3, 3), "up0": (40, 6, 6)}
    maps = {tap: torch.randn(2, *shape) for tap, shape in shapes.items()}
    summed = torch.zeros(2, 12, 6, 6)
    for index, one in enumerate(maps.values()):
        resized = torch.nn.functional.interpolate(one, size=(6, 6))
        weight, bias = state[f"fusion_proj.{index}.weight"], state[f"fusion_proj.{index}.bias"]
        summed = summed + torch.nn.functional.conv2d(resized, weight, bias)
    wanted = torch.nn.functional.conv2d(summed, state["input_proj.weight"], state["input_proj.bias"])
    ours = adapter._fuse(Features(maps, torch.tensor([1, 2])))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_a_fused_feature_must_be_named() -> None:
    with pytest.raises(InputError, match="all-12-<size>"):
        adapter_from_official(fused_checkpoint(), {"bottom0": 16, "mid": 24, "up0": 40}, num_heads=4)
    with pytest.raises(InputError, match="one map more than the 2"):
        adapter_from_official(fused_checkpoint(), {"bottom0": 16, "mid": 24}, fusion=(12, 6), num_heads=4)
    with pytest.raises(InputError, match="`fusion_proj.1.weight` has shape"):
        adapter_from_official(fused_checkpoint(), {"bottom0": 16, "mid": 25, "up0": 40}, fusion=(12, 6), num_heads=4)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("transformer.level_embed", "unknown to the importer"),
        ("transformer.encoder.norm.weight", "pre-norm"),
        ("position_embedding.row_embed.weight", "learned positions"),
        ("unet.conv_in.weight", "no attention LoRA"),
        ("fusion_proj.0.weight", "fused feature"),
    ],
)
def test_unknown_keys_are_refused(key: str, message: str) -> None:
    with pytest.raises(InputError, match=f"`{key}`.*{message}"):
        adapter_state_from_official(CHECKPOINT | {key: torch.zeros(1)}, UP1)


def test_a_shape_that_contradicts_the_others_is_refused_by_its_own_name() -> None:
    with pytest.raises(InputError, match=r"`class_embed.bias` has shape \(7,\), the others ask for \(256,\)"):
        adapter_from_official(CHECKPOINT | {"class_embed.bias": torch.zeros(7)}, UP1, num_heads=4)
    with pytest.raises(InputError, match=r"has shape \(\)"):
        adapter_from_official(CHECKPOINT | {"query_embed.weight": torch.zeros(())}, UP1, num_heads=4)


def test_queries_must_be_left_to_ground() -> None:
    with pytest.raises(InputError, match="30 queries"):
        adapter_from_official(CHECKPOINT, UP1, num_heads=4, num_queries_matching=30)


@pytest.mark.parametrize("lost", ["query_embed", "map_to_clip.0", "map_to_clip.2", "bbox_embed.layers.1", "input_proj"])
def test_missing_keys_are_refused(lost: str) -> None:
    partial = {key: tensor for key, tensor in CHECKPOINT.items() if not key.startswith(lost)}
    with pytest.raises(InputError, match="lacks the tensor|has no tensor for"):
        adapter_from_official(partial, UP1, num_heads=4)


def test_a_tap_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="takes 40 channels, tap mid gives 39"):
        adapter_from_official(CHECKPOINT, {"mid": 39}, num_heads=4)


def test_a_whole_checkpoint_in_place_of_the_adapters_part_is_told() -> None:
    with pytest.raises(InputError, match=r"is none of the adapter's; give `sort_official\(state\).adapter` of a whole"):
        adapter_from_official(WHOLE, {"up1": 1})
