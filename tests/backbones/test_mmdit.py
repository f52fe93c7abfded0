import pytest
import torch

from dpt_t2i.backbones.mmdit import check_patches, joint_block_taps
from dpt_t2i.backbones.types import Tap
from dpt_t2i.errors import InputError


def test_taps_follow_the_forward_pass():
    taps = joint_block_taps({"double": ("transformer_blocks", 2), "single": ("single_transformer_blocks", 1)}, 32, 2)
    assert list(taps) == ["double0", "double1", "single0"]
    assert taps["double1"] == Tap("double1", "transformer_blocks.1", 32, 2, "second")
    assert taps["single0"].module == "single_transformer_blocks.0"


@pytest.mark.parametrize("sides, message", [((4, 5), "image of 40 x 32 pixels"), ((3, 4), "image of 32 x 24 pixels")])
def test_half_a_patch_is_refused_in_pixels(sides, message):
    with pytest.raises(InputError, match=f"{message}: both sides must be multiples of 16"):
        check_patches(torch.zeros(1, 4, *sides), patch=2, vae_scale=8)
    check_patches(torch.zeros(1, 4, 4, 6), patch=2, vae_scale=8)
