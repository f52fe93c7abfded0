"""Spans of characters to rows over tokens."""

import pytest
import torch

from dpt_t2i.errors import InputError
from dpt_t2i.objectives.positions import positive_map

TEXT = "the red star"
OFFSETS = [(0, 0), (0, 3), (4, 7), (8, 10), (10, 12), (0, 0), (0, 0)]  # BOS, the, red, st, ar, EOS, padding


@pytest.mark.parametrize(
    ("spans", "tokens"),
    [
        ([(4, 7)], [2]),  # red
        ([(8, 12)], [3, 4]),  # star, two tokens
        ([(4, 12)], [2, 3, 4]),
        ([(3, 8)], [2]),  # " red ": spaces at both ends belong to nobody
        ([(5, 6)], [2]),  # a letter inside
        ([(0, 3), (8, 12)], [1, 3, 4]),  # two spans
        ([(0, 3), (3, 4)], [1]),  # the second is a space, the first is enough
    ],
)
def test_tokens_that_share_a_character(spans: list[tuple[int, int]], tokens: list[int]) -> None:
    row = positive_map(OFFSETS, [spans], num_token_classes=8)
    assert row.shape == (1, 9)
    assert row[0].nonzero().flatten().tolist() == tokens
    assert row.sum().item() == pytest.approx(1.0)
    assert (positive_map(OFFSETS, [spans], num_token_classes=8) > 0).float().sum().item() == len(tokens)


def test_zero_width_tokens_inside_a_span_belong_to_it() -> None:
    """Byte-level tokenizers give a lone space marker an empty range between two words."""
    offsets = [(0, 0), (0, 3), (4, 4), (4, 7), (0, 0)]
    assert (positive_map(offsets, [[(0, 7)]], 5) > 0).float()[0].tolist() == [0, 1, 1, 1, 0, 0]


def test_one_row_a_box() -> None:
    rows = positive_map(OFFSETS, [[(0, 3)], [(4, 7)]], num_token_classes=8)
    assert rows.argmax(dim=1).tolist() == [1, 2]
    assert positive_map(OFFSETS, [], num_token_classes=8).shape == (0, 9)


@pytest.mark.parametrize("span", [(3, 4), (5, 5), (20, 24), (8, 12)])
def test_a_span_that_touches_no_token_is_an_error(span: tuple[int, int]) -> None:
    offsets = OFFSETS[:3] if span == (8, 12) else OFFSETS  # the tokenizer cut the text after "red"
    with pytest.raises(InputError, match="touch no token"):
        positive_map(offsets, [[span]])


def test_no_object_column_is_never_marked() -> None:
    rows = positive_map(OFFSETS, [[(0, 12)]], num_token_classes=4)
    assert torch.equal(rows[0, -1], torch.tensor(0.0))
    assert rows[0, :4].nonzero().flatten().tolist() == [1, 2, 3]


def test_a_character_of_several_tokens_is_its_first_ones() -> None:
    """`caf\u00e9` in byte-level BPE: its last letter is two tokens, of which `char_to_token` gives the first."""
    offsets = [(0, 0), (0, 2), (2, 3), (3, 4), (3, 4), (5, 8), (0, 0)]  # BOS, ca, f, e-acute twice, bar, EOS
    assert (positive_map(offsets, [[(0, 4)]], 7) > 0).float()[0].nonzero().flatten().tolist() == [1, 2, 3]
    assert (positive_map(offsets, [[(0, 8)]], 7) > 0).float()[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
