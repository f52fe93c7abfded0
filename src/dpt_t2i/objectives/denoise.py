"""Denoising: what keeps the tuned model a generator."""

from __future__ import annotations

from torch import Tensor

from dpt_t2i.errors import InputError


def denoise_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    snr: Tensor | None = None,
    snr_gamma: float | None = None,
    prediction_type: str = "epsilon",
) -> Tensor:
    """Mean squared error, a mean over each example and then over the batch, in float32.

    With `snr_gamma`, min-SNR weights (Hang et al., ICCV 2023, section 3.4): min(SNR, gamma) / SNR for a predicted
    noise, min(SNR, gamma) / (SNR + 1) for a predicted velocity.

    Args:
        prediction: `[B, ...]` of the denoiser.
        target: `[B, ...]` noise, v or flow velocity: what the scheduler wants predicted.
        snr: `[B]` signal-to-noise ratio alpha_bar / (1 - alpha_bar) at each example's timestep.
        snr_gamma: None = plain mean squared error.
        prediction_type: `epsilon` or `v_prediction`, looked at only with `snr_gamma`.

    Raises:
        InputError: `snr_gamma` with another prediction type, such as flow matching.
    """
    per_example = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    if snr_gamma is None:
        return per_example.mean()
    if snr is None:
        raise ValueError("snr_gamma needs the examples' snr")
    return (per_example * _min_snr_weight(snr.float(), snr_gamma, prediction_type)).mean()


def _min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)  # also right at SNR 0, where min(SNR, gamma) / SNR would be 0 / 0
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1.0)
    raise InputError(f"snr_gamma is not defined for prediction type `{prediction_type}`; leave snr_gamma out")
