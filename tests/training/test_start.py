"""What `--qformer_ckpt` takes: our folders, and the release's file, by itself or in its folder."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpt_t2i.adapter.grounding_text import load_grounding_text
from dpt_t2i.adapter.io import save_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import AdapterConfig
from dpt_t2i.errors import InputError
from dpt_t2i.training.start import restore_start, tap_of_start
from tests.tiny import tiny_adapter, tiny_backbone
from tests.training.test_official import TEXT_WIDTH, roberta_folder, tuned_roberta, with_roberta

PREFIX = "checkpoint."
RELEASED = {
    key.removeprefix(PREFIX): tensor
    for key, tensor in load_file(Path(__file__).parents[1] / "parity" / "adapter.safetensors").items()
    if key.startswith(PREFIX)
}
HEADS = AdapterConfig(num_heads=4)
UP1 = (Tap("up1", "up_blocks.1", 40, 4),)
NO_BASE: Any = None  # a released checkpoint knows no base


@pytest.mark.parametrize("inside", ["", "adapter", "run/adapter", "run/checkpoint-3/adapter"])
def test_one_of_ours_by_any_folder_around_it(tmp_path: Path, inside: str) -> None:
    backbone = tiny_backbone()
    ours = tiny_adapter(backbone)
    save_adapter(ours, tmp_path / inside, base_fingerprint=backbone.fingerprint(), metadata={"best": 0.5})
    given = tmp_path / inside.removesuffix("/adapter").removesuffix("adapter")
    adapter, metadata = restore_start(str(given), backbone, backbone.parse_taps("up1"), AdapterConfig())
    assert metadata == {"best": 0.5}
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in adapter.state_dict().items())
    with pytest.raises(InputError, match="reads tap `up1`, the config says `mid`"):
        restore_start(str(given), backbone, backbone.parse_taps("mid"), AdapterConfig())


@pytest.mark.parametrize("as_folder", [True, False])
def test_the_releases_checkpoint(tmp_path: Path, as_folder: bool, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(RELEASED, file)
    adapter, metadata = restore_start(str(tmp_path if as_folder else file), NO_BASE, UP1, HEADS)
    assert adapter.logit_scale.exp().item() == pytest.approx(20.0), "which the release's own loader forgets"
    assert (adapter.config.hidden_dim, adapter.config.num_heads, adapter.config.num_queries_rec) == (64, 4, 20)
    assert adapter.config.grounding_text == "roberta-base" and not adapter.config.normalize_features
    assert metadata == {"imported": "pytorch_model.bin"}
    assert "1 tensors of the denoiser's LoRA are left" in caplog.text


def test_the_caption_encoder_that_is_named_holds(tmp_path: Path) -> None:
    torch.save(RELEASED, tmp_path / "pytorch_model.bin")
    settings = AdapterConfig(num_heads=4, grounding_text="my/roberta")
    assert restore_start(str(tmp_path), NO_BASE, UP1, settings)[0].config.grounding_text == "my/roberta"


def test_the_tap_is_that_of_the_adapter_unless_said(tmp_path: Path) -> None:
    assert tap_of_start(None) == tap_of_start("none") == "up1"
    torch.save(RELEASED, tmp_path / "pytorch_model.bin")
    assert tap_of_start(str(tmp_path)) == "up1"  # which was trained with it, unless the user knows better
    config = AdapterConfig(hidden_dim=8, num_heads=2, fusion_channels=6, fusion_size=4)
    for name, fused in (("plain", AdapterConfig(hidden_dim=8, num_heads=2)), ("fused", config)):
        adapter = DiscriminativeAdapter(fused, {"mid": 24, "up2": 8}, 16, 16)
        save_adapter(adapter, tmp_path / name / "adapter", base_fingerprint={"name": "x"}, metadata={})
    assert tap_of_start(str(tmp_path / "plain")) == "mid_up2"
    assert tap_of_start(str(tmp_path / "fused" / "adapter")) == "mid_up2-6-4"


def test_another_tap_than_it_was_trained_with(tmp_path: Path) -> None:
    torch.save(RELEASED, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="takes 40 channels, tap mid gives 24"):
        restore_start(str(tmp_path), NO_BASE, (Tap("mid", "mid_block", 24, 8),), HEADS)


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("this code ran",)


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"logit_scale": Hostile()}, file)
    with pytest.raises(InputError, match="holds more than tensors, perhaps code") as caught:
        restore_start(str(file), NO_BASE, UP1, HEADS)
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04half", pickle.dumps([1, 2])])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content)
    with pytest.raises(InputError, match=str(file)):
        restore_start(str(file), NO_BASE, UP1, HEADS)


def test_a_folder_with_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter in"):
        restore_start(str(tmp_path), tiny_backbone(), UP1, HEADS)


def test_a_folder_of_newer_accelerate(tmp_path: Path) -> None:
    save_file(RELEASED, tmp_path / "model.safetensors")
    adapter, metadata = restore_start(str(tmp_path), NO_BASE, UP1, HEADS)
    assert metadata == {"imported": "model.safetensors"} and adapter.config.num_queries_rec == 20


def test_a_tuned_caption_encoder_comes_along_and_stays_with_the_adapter(tmp_path: Path) -> None:
    torch.save(with_roberta(RELEASED), tmp_path / "pytorch_model.bin")
    settings = AdapterConfig(num_heads=4, grounding_text=str(roberta_folder(tmp_path / "roberta")))
    file, keep = str(tmp_path / "pytorch_model.bin"), tmp_path / "run" / "start" / "grounding_text"
    keep.parent.mkdir(parents=True)
    adapter, _ = restore_start(file, NO_BASE, UP1, settings, keep=keep)
    assert adapter.config.grounding_text == str(keep)
    save_adapter(adapter, tmp_path / "saved", base_fingerprint={"architecture": {}})
    for folder in (keep, tmp_path / "saved" / "grounding_text"):
        found = load_grounding_text(str(folder), torch.device("cpu")).encoder.state_dict()
        assert all(torch.equal(value, tuned_roberta().state_dict()[name]) for name, value in found.items())
    before = (keep / "model.safetensors").stat().st_mtime_ns
    restore_start(file, NO_BASE, UP1, settings, keep=keep)  # a run that goes on, and every other process
    assert (keep / "model.safetensors").stat().st_mtime_ns == before
    other = with_roberta(RELEASED)
    other |= {name: value + 1 for name, value in other.items() if "text_encoder" in name and value.is_floating_point()}
    torch.save(other, tmp_path / "pytorch_model.bin")
    restore_start(file, NO_BASE, UP1, settings, keep=keep)  # the run was begun anew, from another checkpoint
    found = load_grounding_text(str(keep), torch.device("cpu")).encoder.state_dict()
    changed = [name for name, value in tuned_roberta().state_dict().items() if not torch.equal(value, found[name])]
    assert changed, "the encoder of before is not paired with it"


def test_a_tuned_caption_encoder_without_its_start_is_one_line(tmp_path: Path) -> None:
    torch.save(with_roberta(RELEASED), tmp_path / "pytorch_model.bin")
    settings = AdapterConfig(num_heads=4, grounding_text=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="tuned caption encoder, which is complete with .*nowhere.* alone"):
        restore_start(str(tmp_path), NO_BASE, UP1, settings, keep=tmp_path / "run" / "grounding_text")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_without_the_alignment_loss_its_layers_are_as_wide_as_the_encoder_that_is_named(tmp_path: Path) -> None:
    start = roberta_folder(tmp_path / "roberta")
    without = {key: value for key, value in RELEASED.items() if "contrastive_align_projection" not in key}
    assert len(without) < len(RELEASED)
    torch.save(without, tmp_path / "pytorch_model.bin")
    settings = AdapterConfig(num_heads=4, grounding_text=str(start))
    assert restore_start(str(tmp_path), NO_BASE, UP1, settings)[0].text_dim == TEXT_WIDTH


def test_a_checkpoint_without_its_logit_scale_starts_at_the_releases(tmp_path: Path) -> None:
    torch.save({key: value for key, value in RELEASED.items() if key != "logit_scale"}, tmp_path / "pytorch_model.bin")
    adapter, _ = restore_start(str(tmp_path), NO_BASE, UP1, HEADS)
    assert adapter.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
