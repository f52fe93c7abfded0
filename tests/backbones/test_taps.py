import pytest
import torch

from dpt_t2i.backbones.taps import parse_taps, pick_map, tap_of_output
from dpt_t2i.backbones.types import Tap
from dpt_t2i.backbones.unet_taps import unet_taps
from dpt_t2i.errors import InputError

TABLE = unet_taps({"block_out_channels": (8, 16, 16), "mid_block_type": "UNetMidBlock2DCrossAttn"})
SIDES = (16, 32)  # of the latents


def names(taps: tuple[Tap, ...]) -> list[str]:
    return [tap.name for tap in taps]


def test_joined_names_keep_their_order():
    assert names(parse_taps("up1_bottom0_mid", TABLE)) == ["up1", "bottom0", "mid"]


def test_a_dotted_path_with_underscores_may_be_joined_too():
    def inner(path: str) -> Tap | None:
        return Tap(path, path, 8, 1) if path in ("up_blocks.1.resnets.0", "mid_block.attentions.0") else None

    found = parse_taps("bottom0_up_blocks.1.resnets.0_mid_block.attentions.0_up1", TABLE, inner)
    assert names(found) == ["bottom0", "up_blocks.1.resnets.0", "mid_block.attentions.0", "up1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("upp1", "`upp1`; did you mean `up1`"),
        ("up1_botom0", "`botom0`; did you mean `bottom0`"),
        ("up_blocks.9", "`up_blocks.9`"),
        ("", "unknown tap ``"),
        ("up1_up1", "twice"),
    ],
)
def test_unknown_and_double_names_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_taps(text, TABLE, lambda path: None)


def test_an_output_tells_channels_and_stride():
    assert tap_of_output("a.b", torch.zeros(1, 24, 4, 8), SIDES) == Tap("a.b", "a.b", 24, 4, "tensor")
    assert tap_of_output("a.b", (torch.zeros(1, 24, 8, 16), None), SIDES) == Tap("a.b", "a.b", 24, 2, "first")


def test_tokens_are_laid_out_by_rows():
    tokens = torch.arange(4 * 8.0)[None, :, None].expand(1, 32, 24)
    tap = tap_of_output("a.b", tokens, SIDES)
    assert tap == Tap("a.b", "a.b", 24, 4, "tensor")
    grid = pick_map(tokens, tap, SIDES)
    assert grid.shape == (1, 24, 4, 8)
    assert torch.equal(grid[0, 5], torch.arange(32.0).reshape(4, 8))
    assert grid.is_contiguous(), "else training the adapter's norm on it crashes the process"
    words = torch.zeros(1, 77, 24)
    joint = tap_of_output("a.b", (words, tokens), SIDES)
    assert joint.select == "second"
    assert torch.equal(pick_map((words, tokens), joint, SIDES), grid)
    with pytest.raises(ValueError, match="sides"):
        pick_map(tokens, tap)


@pytest.mark.parametrize("output", [torch.zeros(1, 16, 24), (torch.zeros(1, 8),), None, ()])
def test_what_is_no_map_is_refused(output):
    with pytest.raises(InputError, match=r"a\.b.*no map of the image"):
        tap_of_output("a.b", output, SIDES)
