import pytest
import torch

from dpt_t2i.backbones.unet_taps import unet_taps
from tests.tiny import tiny_backbone

SD1 = {"block_out_channels": (320, 640, 1280, 1280), "mid_block_type": "UNetMidBlock2DCrossAttn"}


def test_table_of_stable_diffusion_1_is_that_of_the_release():
    # Channels: the table in the release's models/model.py; strides: 64x64 latents give these maps.
    expected = {
        "bottom0": (320, 2), "bottom1": (640, 4), "bottom2": (1280, 8), "bottom3": (1280, 8), "mid": (1280, 8),
        "up0": (1280, 4), "up1": (1280, 2), "up2": (640, 1), "up3": (320, 1),
    }  # fmt: skip
    assert {name: (tap.channels, tap.stride) for name, tap in unet_taps(SD1).items()} == expected


@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 16, 16), (8, 8, 16, 16, 32)])
def test_any_number_of_levels(widths):
    table = unet_taps({"block_out_channels": widths, "mid_block_type": None})
    assert "mid" not in table
    assert len(table) == 2 * len(widths)
    assert table[f"bottom{len(widths) - 1}"].stride == 2 ** (len(widths) - 1)
    assert table[f"up{len(widths) - 1}"].stride == 1


def test_every_declared_channel_and_stride_is_what_the_network_gives():
    backbone = tiny_backbone()
    noisy = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        _, features = backbone.predict(noisy, torch.tensor([5]), backbone.null_text(1), tuple(backbone.taps.values()))
    assert list(features.maps) == list(backbone.taps)
    for name, tap in backbone.taps.items():
        assert features.maps[name].shape == (1, tap.channels, 16 // tap.stride, 16 // tap.stride), name
