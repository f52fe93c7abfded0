"""The denoising loss and its min-SNR weights."""

import pytest
import torch

from dpt_t2i.errors import InputError
from dpt_t2i.objectives.denoise import denoise_dpo_loss, denoise_itm_loss, denoise_loss

TARGET = torch.zeros(2, 1, 1, 2)
PREDICTION = torch.tensor([[[[1.0, 3.0]]], [[[2.0, 0.0]]]])  # squared error 5 and 2 an example
SNR = torch.tensor([20.0, 2.0])


def test_plain_is_the_mean_of_examples() -> None:
    assert denoise_loss(PREDICTION, TARGET).item() == pytest.approx(3.5)


def test_min_snr_weights_by_hand() -> None:
    epsilon = denoise_loss(PREDICTION, TARGET, snr=SNR, snr_gamma=5.0)
    assert epsilon.item() == pytest.approx((5 * 5 / 20 + 2 * 1) / 2)
    velocity = denoise_loss(PREDICTION, TARGET, snr=SNR, snr_gamma=5.0, prediction_type="v_prediction")
    assert velocity.item() == pytest.approx((5 * 5 / 21 + 2 * 2 / 3) / 2)


def test_zero_terminal_snr_is_finite() -> None:
    loss = denoise_loss(PREDICTION, TARGET, snr=torch.zeros(2), snr_gamma=5.0)
    assert loss.item() == pytest.approx(3.5)


def test_flow_matching_has_no_min_snr() -> None:
    with pytest.raises(InputError, match="`flow_matching`"):
        denoise_loss(PREDICTION, TARGET, snr=SNR, snr_gamma=5.0, prediction_type="flow_matching")


def test_half_precision_is_squared_in_float32() -> None:
    large = torch.full((1, 4), 300.0, dtype=torch.float16)  # 90000 overflows float16
    assert denoise_loss(large, torch.zeros_like(large)).item() == 90000.0


def test_matching_by_the_error_by_hand() -> None:
    """Errors 2 and 3 at temperature 0.5: half of the own one more, so softplus(-1); the divisor takes no gradient."""
    own, hard = torch.tensor([2.0, 4.0], requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)
    loss = denoise_itm_loss(own, hard, temperature=0.5)
    assert loss.tolist() == pytest.approx([0.3132617, 0.6931472])  # log(1 + 1/e), log 2
    loss.sum().backward()
    assert own.grad.tolist() == pytest.approx([0.2689414, 0.25])  # sigmoid(-1) / (0.5 * 2), 0.5 / (0.5 * 4)
    assert hard.grad.tolist() == pytest.approx([-0.2689414, -0.25])


def test_preferring_a_picture_by_hand() -> None:
    """The own error fell by 0.5, the other rose by 0.5, at temperature 0.5 of the base's own 2: softplus(-1)."""
    own, hard = torch.tensor([1.5, 3.0], requires_grad=True), torch.tensor([4.5, 2.0], requires_grad=True)
    plain = [torch.tensor(values, requires_grad=True) for values in ([2.0, 4.0], [4.0, 3.0])]
    loss = denoise_dpo_loss(own, hard, *plain, temperature=0.5)
    assert loss.tolist() == pytest.approx([0.3132617, 0.6931472])  # the second pair moved together: a guess
    loss.sum().backward()
    assert own.grad.tolist() == pytest.approx([0.2689414, 0.25])
    assert hard.grad.tolist() == pytest.approx([-0.2689414, -0.25])
    assert plain[0].grad is None and plain[1].grad is None
