"""Our attention against PyTorch's module on the same weights, and when queries are worked out once for all images."""

import pytest
import torch
from torch import nn

from dpt_t2i.adapter.transformer import Transformer, attend

DIM, HEADS = 16, 4


@pytest.fixture
def attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    nn.init.normal_(module.in_proj_bias)  # PyTorch's start of 0 would hide a bias that is forgotten
    nn.init.normal_(module.out_proj.bias)
    return module


def test_attention_is_that_of_pytorchs_module(attention: nn.MultiheadAttention) -> None:
    queries, keys, values = torch.randn(3, 5, DIM), torch.randn(3, 7, DIM), torch.randn(3, 7, DIM)
    found = attend(attention, queries, keys, values)
    expected = attention(queries, keys, values, need_weights=False)[0]
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = [
        torch.autograd.grad((result * weights).sum(), list(attention.parameters())) for result in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_shared_queries_are_those_repeated_for_each_image(attention: nn.MultiheadAttention) -> None:
    queries, keys, values = torch.randn(1, 5, DIM), torch.randn(3, 7, DIM), torch.randn(3, 7, DIM)
    repeated = attend(attention, queries.repeat(3, 1, 1), keys, values)
    torch.testing.assert_close(attend(attention, queries, keys, values), repeated)


@pytest.mark.parametrize("layers", [1, 2])
def test_images_that_are_alike_share_all_but_their_dropout(layers: int) -> None:
    """Dropout masks are drawn for each image, so images that are alike part in training, and only there."""
    torch.manual_seed(0)
    transformer = Transformer(DIM, HEADS, 32, 0, layers, 0.5)  # no encoder: only the decoder can part them
    source, positions = torch.randn(1, 6, DIM).repeat(2, 1, 1), torch.randn(1, 6, DIM).repeat(2, 1, 1)
    first, second = transformer.eval()(source, positions, torch.randn(5, DIM))
    torch.testing.assert_close(first, second)
    first, second = transformer.train()(source, positions, torch.randn(5, DIM))
    assert not torch.allclose(first, second)


def test_self_attention_of_the_first_layer_draws_a_mask_for_each_image() -> None:
    torch.manual_seed(0)
    transformer = Transformer(DIM, HEADS, 32, 0, 1, 0.5).train()
    seen: list[torch.Size] = []
    transformer.decoder[0].norm1.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    given = torch.randn(2, 6, DIM), torch.randn(2, 6, DIM), torch.randn(5, DIM)
    transformer(*given)
    transformer.eval()(*given)
    assert seen == [(2, 5, DIM), (1, 5, DIM)]
