"""Importing a released checkpoint: every key is taken, ignored with a reason, or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpt_t2i.adapter.official import adapter_from_official, adapter_state_from_official
from dpt_t2i.errors import InputError

PREFIX = "checkpoint."
CHECKPOINT = {
    key.removeprefix(PREFIX): tensor
    for key, tensor in load_file(Path(__file__).parents[1] / "parity" / "adapter.safetensors").items()
    if key.startswith(PREFIX)
}
UP1 = {"up1": 40}


def test_every_key_is_accounted_for_once() -> None:
    adapter, table = adapter_from_official(CHECKPOINT, UP1, num_heads=4)
    assert [row.key for row in table] == list(CHECKPOINT)
    ignored = [row for row in table if row.action == "ignored"]
    assert len(ignored) == 1 and ignored[0].key.startswith("unet.") and "LoRA" in ignored[0].note
    assert sorted(row.note for row in table if row.action == "taken") == sorted(adapter.state_dict())


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


def test_names_of_a_distributed_wrapper_are_taken() -> None:
    wrapped = {f"module.{key}": tensor for key, tensor in CHECKPOINT.items()}
    assert adapter_state_from_official(wrapped, UP1)[0].keys() == adapter_state_from_official(CHECKPOINT, UP1)[0].keys()


def test_several_taps_cut_the_projection() -> None:
    placed, table = adapter_state_from_official(CHECKPOINT, {"bottom0": 16, "up0": 24})
    weight = torch.cat([placed["projections.bottom0.weight"], placed["projections.up0.weight"]], dim=1)
    assert torch.equal(weight, CHECKPOINT["input_proj.weight"])
    bias = placed["projections.bottom0.bias"] + placed["projections.up0.bias"]
    assert torch.equal(bias, CHECKPOINT["input_proj.bias"])
    notes = {row.key: row.note for row in table}
    assert notes["input_proj.weight"] == "projections.bottom0.weight, projections.up0.weight"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("transformer.level_embed", "unknown to the importer"),
        ("text_encoder.embeddings.LayerNorm.bias", "tuned RoBERTa"),
        ("fusion_proj.0.weight", "all-"),
    ],
)
def test_unknown_keys_are_refused(key: str, message: str) -> None:
    with pytest.raises(InputError, match=f"`{key}`.*{message}"):
        adapter_state_from_official(CHECKPOINT | {key: torch.zeros(1)}, UP1)


@pytest.mark.parametrize("lost", ["query_embed", "map_to_clip.0", "map_to_clip.2", "bbox_embed.layers.1", "input_proj"])
def test_missing_keys_are_refused(lost: str) -> None:
    partial = {key: tensor for key, tensor in CHECKPOINT.items() if not key.startswith(lost)}
    with pytest.raises(InputError, match="lacks the tensor|has no tensor for"):
        adapter_from_official(partial, UP1, num_heads=4)


def test_a_tap_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="takes 40 channels, tap mid gives 39"):
        adapter_from_official(CHECKPOINT, {"mid": 39}, num_heads=4)
