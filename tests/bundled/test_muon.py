"""Muon of the bundled model's recipe: against singular values, against AdamW, and against itself after a stop."""

import pytest
import torch
from tools.bundled.muon import SMALLEST, Muon, orthogonalize
from torch import Tensor, nn

RATE = 1e-2


def model() -> nn.Module:
    """A first and a last layer, a matrix, a wide kernel, and vectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.Conv2d(16, 12, 3), nn.GroupNorm(4, 12), nn.Linear(12, 40), nn.Linear(40, 3)
    )


def give_gradients(of: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in of.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def values(of: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in of.parameters()]


@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 12, 50), (2, 50, 12)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, before, right = torch.linalg.svd(matrices, full_matrices=False)
    made = orthogonalize(matrices)
    assert made.shape == matrices.shape
    steep = before / before.norm(dim=-1, keepdim=True) > 0.02  # smaller ones need more than five steps
    found = torch.linalg.svdvals(made)
    assert float(found.max()) < 1.3 and steep.float().mean() > 0.9
    kept = (left.mT @ made @ right.mT).diagonal(dim1=-2, dim2=-1)  # in the matrices' own singular directions
    assert float(kept[steep].min()) > 0.6 and float(kept.max()) < 1.3
    torch.testing.assert_close((left * kept[:, None]) @ right, made, rtol=0, atol=1e-4)


def test_a_step_is_as_long_as_adamws() -> None:
    """Of a matrix of full rank the root mean square is 0.2 of the rate, as far as its singular values are one."""
    ours = model()
    optimizer = Muon(ours, RATE)
    before = [p.detach().clone() for p in optimizer.matrices]
    give_gradients(ours, 1)
    optimizer.step(RATE)
    assert [tuple(p.flatten(1).shape) for p in optimizer.matrices] == [(16, 36), (12, 144), (40, 12)]
    for old, new in zip(before, optimizer.matrices, strict=True):
        length = float((new.detach() - old).square().mean().sqrt())
        assert 0.7 < length / (0.2 * RATE) < 1.2


def test_vectors_and_first_and_last_layers_are_adamws() -> None:
    ours, twin = model(), model()
    optimizer = Muon(ours, RATE)
    small = [p for p in ours.parameters() if p.ndim == 1 or min(p.flatten(1).shape) <= SMALLEST]
    assert {id(p) for p in optimizer.others} == {id(p) for p in small}
    assert [tuple(p.shape) for p in optimizer.others] == [(16,), (12,), (12,), (12,), (40,), (3, 40), (3,)]
    adamw = torch.optim.AdamW(twin.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    for seed in (1, 2):
        for one in (ours, twin):
            give_gradients(one, seed)
        optimizer.step(RATE)
        adamw.step()
    theirs = dict(zip(map(id, ours.parameters()), twin.parameters(), strict=True))
    assert all(torch.equal(p, theirs[id(p)]) for p in optimizer.others)
    assert not any(torch.equal(p, theirs[id(p)]) for p in optimizer.matrices)


def test_a_saved_state_goes_on_where_it_was() -> None:
    whole, stopped = model(), model()
    straight, first = Muon(whole, RATE), Muon(stopped, RATE)
    for seed in (1, 2):
        for one, optimizer in ((whole, straight), (stopped, first)):
            give_gradients(one, seed)
            optimizer.step(RATE)
    resumed = Muon(stopped, lr=1.0)
    resumed.load_state_dict(first.state_dict())
    fresh = model()
    fresh.load_state_dict(stopped.state_dict())
    for one, optimizer in ((whole, straight), (stopped, resumed), (fresh, Muon(fresh, RATE))):
        give_gradients(one, 3)
        optimizer.step(RATE)
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(stopped), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(values(whole), values(fresh), strict=True)), "the state counts"


def test_zero_grad_forgets_every_gradient() -> None:
    ours = model()
    give_gradients(ours, 1)
    Muon(ours, RATE).zero_grad()
    assert all(p.grad is None for p in ours.parameters())
