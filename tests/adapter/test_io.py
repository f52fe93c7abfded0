"""An adapter folder: round trip, and one clear line for everything that can be wrong with it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpt_t2i.adapter.io import download_adapter, load_adapter, read_adapter_card, save_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.types import Features
from dpt_t2i.config import AdapterConfig
from dpt_t2i.errors import InputError

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "architecture": {"block_out_channels": (4, 8), "text_width": 12, "prediction_type": "epsilon"},
    "name": "tiny",
    "weights": "abc123",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = AdapterConfig(hidden_dim=8, num_heads=2, dim_feedforward=8, num_queries_matching=2, num_queries_rec=3)
    adapter = DiscriminativeAdapter(config, {"up1": 4, "mid": 6}, pooled_dim=12, text_dim=12)
    with torch.no_grad():
        adapter.logit_scale.fill_(3.0)
    save_adapter(adapter, tmp_path / "adapter", base_fingerprint=BASE, metadata={"correction": {"rho": 0.03}})
    return tmp_path / "adapter"


def test_round_trip_gives_the_same_function(folder: Path) -> None:
    first, metadata = load_adapter(folder, CPU, BASE)
    assert metadata == {"correction": {"rho": 0.03}}
    assert not first.training and first.logit_scale.item() == 3.0
    assert list(first.tap_channels) == ["up1", "mid"]
    save_adapter(first, folder.parent / "again", base_fingerprint=BASE, metadata=metadata)
    second, _ = load_adapter(folder.parent / "again", CPU)
    given = Features({"up1": torch.randn(2, 4, 4, 4), "mid": torch.randn(2, 6, 2, 2)}, torch.tensor([1, 2]))
    torch.testing.assert_close(first(given).match_embeds, second(given).match_embeds, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in second.parameters())
    card = read_adapter_card(folder)
    assert card["base"]["name"] == "tiny" and card["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_loading_draws_no_random_number(folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_adapter(folder, CPU)
    assert torch.equal(torch.rand(3), expected)


def test_another_architecture_is_an_error_that_names_both(folder: Path) -> None:
    wider = BASE | {"name": "wide", "architecture": BASE["architecture"] | {"text_width": 1024}}
    with pytest.raises(InputError, match=r"`tiny` \(text_width 12\).*`wide` \(text_width 1024\)"):
        load_adapter(folder, CPU, wider)


def warned(caplog: pytest.LogCaptureFixture, folder: Path, base: dict[str, Any]) -> list[str]:
    """What loading the adapter for `base` warns of."""
    caplog.clear()
    load_adapter(folder, CPU, base)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_other_weights_are_a_warning_that_names_both(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (message,) = warned(caplog, folder, BASE | {"name": "mine", "weights": "fff"})
    assert "`tiny` (denoiser abc123)" in message and "`mine`" in message and "(denoiser fff)" in message
    assert str(folder) in message
    assert warned(caplog, folder, BASE) == []


def test_another_lora_is_a_warning_that_names_both(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture):
    adapter, _ = load_adapter(folder, CPU)
    assert warned(caplog, folder, BASE | {"lora": "aaa"}) == []  # written before adapters knew their LoRA
    for own in ("aaa", None):
        save_adapter(adapter, tmp_path / "own", base_fingerprint=BASE | {"lora": own})
        assert warned(caplog, tmp_path / "own", BASE | {"lora": own}) == []
        assert warned(caplog, tmp_path / "own", BASE) == []
        (message,) = warned(caplog, tmp_path / "own", BASE | {"lora": "bbb"})
        assert ("LoRA aaa" if own else "with no LoRA") in message and "LoRA bbb" in message


def test_the_hubs_own_methods_write_and_read_the_same_folder(folder: Path, tmp_path: Path) -> None:
    adapter = DiscriminativeAdapter.from_pretrained(folder)
    assert not adapter.training and adapter.logit_scale.item() == 3.0
    adapter.save_pretrained(tmp_path / "hub")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hub" / name).read_bytes() == (folder / name).read_bytes()
    again, metadata = load_adapter(tmp_path / "hub", CPU, BASE)
    assert metadata == {"correction": {"rho": 0.03}}
    assert all(torch.equal(one, again.state_dict()[key]) for key, one in adapter.state_dict().items())
    assert again.origin is not None and again.origin.base["name"] == "tiny"


def test_a_caption_encoder_of_its_own_goes_along(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "grounding_text").mkdir()
    (folder / "grounding_text" / "model.safetensors").write_bytes(b"tuned")
    card = json.loads((folder / "config.json").read_text())
    card["adapter"]["grounding_text"] = "./grounding_text"
    (folder / "config.json").write_text(json.dumps(card))
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "adapter")
    assert read_adapter_card(run)["adapter"]["grounding_text"] == str(run / "adapter" / "grounding_text")
    adapter = DiscriminativeAdapter.from_pretrained(run / "adapter")
    assert adapter.config.grounding_text == str(run / "adapter" / "grounding_text")
    for target in (tmp_path / "hub", run / "adapter"):  # elsewhere, and in its own place
        adapter.save_pretrained(target)
        assert json.loads((target / "config.json").read_text())["adapter"]["grounding_text"] == "./grounding_text"
        assert (target / "grounding_text" / "model.safetensors").read_bytes() == b"tuned"
    adapter.config = adapter.config.model_copy(update={"grounding_text": "denoiser"})  # another one was named
    adapter.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "grounding_text").exists()
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **how: asked.update(how) or "here")
    download_adapter("someone/adapter")
    assert "grounding_text/*" in asked["allow_patterns"]


def test_a_fresh_adapter_is_not_published_without_its_base(tmp_path: Path) -> None:
    config = AdapterConfig(hidden_dim=8, num_heads=2, dim_feedforward=8, num_queries_matching=2, num_queries_rec=3)
    with pytest.raises(InputError, match="does not know its base"):
        DiscriminativeAdapter(config, {"up1": 4}, 12, 12).save_pretrained(tmp_path / "fresh")


def test_from_pretrained_refuses_in_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="damaged"):
        DiscriminativeAdapter.from_pretrained(folder)

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **_: str(folder / "config.json"))
    with pytest.raises(InputError, match="adapter someone/adapter is neither a folder .* no network at all"):
        DiscriminativeAdapter.from_pretrained("someone/adapter")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=name):
        load_adapter(folder, CPU)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        load_adapter(tmp_path / "nowhere", CPU)


@pytest.mark.parametrize("kept", [0, 7, 100, -16])
def test_truncated_weights_are_an_input_error(folder: Path, kept: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(InputError, match="damaged"):
        load_adapter(folder, CPU)


def test_missing_surplus_and_misshapen_tensors_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    cases = {
        "lacks the tensor `logit_scale`": {key: one for key, one in state.items() if key != "logit_scale"},
        "unexpected tensor `extra`": state | {"extra": torch.zeros(1)},
        r"`queries.weight` has shape \(1, 8\), its config says \(5, 8\)": state | {"queries.weight": torch.zeros(1, 8)},
    }
    for message, changed in cases.items():
        save_file(changed, path)
        with pytest.raises(InputError, match=message):
            load_adapter(folder, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "`format_version` is missing"),
        ({"adapter": {"hidden_dim": -1}}, "`adapter.hidden_dim`: .* greater than 0"),
        ({"tap_channels": "up1"}, "`tap_channels` is no object"),
        ({"base": None}, "`base` is no object"),
        ({"adapter": {"hidden_dim": "wide"}}, "`adapter.hidden_dim`: .* valid integer.*; export the adapter again"),
        ({"adapter": {"new_size": 3}}, "`adapter.new_size`: .*; it is of a newer version: upgrade dpt-t2i"),
        ({"format_version": 2}, "upgrade"),
    ],
)
def test_a_damaged_config_is_an_input_error(folder: Path, change: str | dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_adapter(folder, CPU)
