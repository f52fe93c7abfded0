"""What the doctor finds, on a tiny random model."""

from pathlib import Path

import pytest
import torch

from dpt_t2i import doctor
from dpt_t2i.adapter.io import save_adapter
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import add_lora, save_lora
from dpt_t2i.config import DoctorConfig, build_config
from dpt_t2i.errors import InputError
from tests.families import FAMILIES
from tests.tiny import tiny_adapter, tiny_backbone, tiny_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline().save_pretrained(folder)
    return folder


def settings(**values: str) -> DoctorConfig:
    return build_config(DoctorConfig, None, {"device": "cpu", **values})


def test_a_model_that_loads_is_described(base: Path) -> None:
    result = doctor.run_doctor(settings(pretrained_model_name_or_path=str(base)))
    model = result["model"]
    assert model["loads"] and model["image_size"] == [32, 32] and "up1" in model["taps"]
    assert model["denoiser_parameters"] == sum(weight.numel() for weight in tiny_pipeline().unet.parameters())
    assert result["versions"]["torch"] == torch.__version__ and result["device"] == "cpu"
    assert result["fits"]["corrected_image"] == 1 and result["fits"]["tune_batch"] >= 1
    assert str(base.parent) not in str(result)  # no private path in what people paste into issues


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart_sigma", "sdxl"])
def test_a_family_without_the_papers_tap_is_described_too(family: str, tmp_path: Path) -> None:
    result = doctor.run_doctor(settings(pretrained_model_name_or_path=str(FAMILIES[family](tmp_path / family))))
    assert result["model"]["loads"] and result["fits"]["corrected_image"] == 1


def test_a_model_that_does_not_load_is_a_finding(tmp_path: Path) -> None:
    result = doctor.run_doctor(settings(pretrained_model_name_or_path=str(tmp_path / "absent")))
    assert not result["model"]["loads"] and "does not exist" in result["model"]["problem"]
    assert result["summary"][-1].startswith("model     does not load: ")


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_weights_that_are_not_there_are_a_finding(base: Path, tmp_path: Path, name: str) -> None:
    result = doctor.run_doctor(settings(pretrained_model_name_or_path=str(base), **{name: str(tmp_path / "nope")}))
    assert not result["model"]["loads"] and "nope" in result["model"]["problem"]


def test_weights_that_the_base_refuses_are_a_finding(base: Path, tmp_path: Path) -> None:
    other = load_backbone(FAMILIES["sdxl"](tmp_path / "sdxl"), device="cpu")
    add_lora(other, 2)
    save_lora(other, tmp_path / "lora", {})
    result = doctor.run_doctor(settings(pretrained_model_name_or_path=str(base), lora=str(tmp_path / "lora")))
    assert not result["model"]["loads"] and "lora" in result["model"]["problem"].lower()
    save_adapter(tiny_adapter(tiny_backbone(), "up2"), tmp_path / "adapter", base_fingerprint=other.fingerprint())
    result = doctor.run_doctor(settings(pretrained_model_name_or_path=str(base), adapter=str(tmp_path / "adapter")))
    assert not result["model"]["loads"] and "was made for base" in result["model"]["problem"]


def test_a_device_that_is_not_here_is_the_users() -> None:
    with pytest.raises(InputError, match="cuda:99"):
        doctor.run_doctor(settings(device="cuda:99"))


def test_counting_leaves_the_model_frozen_and_the_tap_costs_less_than_the_whole(base: Path) -> None:
    backbone = load_backbone(base, device="cpu")
    whole, tapped = (doctor.activation_bytes(backbone, whole=whole) for whole in (True, False))
    # the first convolution alone keeps its input: 4 x 16 x 16 or 8 x 8 latents in float32
    height, width = (side // backbone.vae_scale for side in backbone.image_size)
    assert whole > tapped > 4 * backbone.latent_channels * height * width
    assert not any(weight.requires_grad for weight in backbone.denoiser.parameters())


@pytest.mark.parametrize("number, expected", [(0.9, 0), (1.0, 1), (3.9, 2), (4.0, 4), (100.0, 64)])
def test_batches_are_powers_of_two(number: float, expected: int) -> None:
    assert doctor._power_below(number) == expected


@pytest.mark.parametrize(
    "free, batch, corrected",
    [
        (79, 0, 0),  # three quarters of it, 59.25, are less than the 60 of a correction
        (80, 0, 1),  # 60; an example takes six passes of 100
        (799, 0, 1),
        (800, 1, 1),  # 600
        (3199, 2, 1),  # 2399.25 are less than four examples' 2400
        (3200, 4, 1),
    ],
)
def test_what_fits_by_hand(free: int, batch: int, corrected: int, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory", lambda device: (free, 10_000))
    monkeypatch.setattr(doctor, "activation_bytes", lambda backbone, whole: 100 if whole else 60)
    result = doctor.run_doctor(settings(pretrained_model_name_or_path=str(base)))
    assert result["fits"] == {"tune_batch": batch, "corrected_image": corrected}
    assert f"--train_batch_size {batch} in tune" in result["summary"][-1]
    assert ("does not fit" in result["summary"][-1]) == (not corrected)
