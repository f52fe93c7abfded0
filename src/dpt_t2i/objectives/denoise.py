"""Denoising: what keeps the tuned model a generator."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

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
    per_example = prediction_error(prediction, target)
    if snr_gamma is None:
        return per_example.mean()
    if snr is None:
        raise ValueError("snr_gamma needs the examples' snr")
    return (per_example * _min_snr_weight(snr.float(), snr_gamma, prediction_type)).mean()


def prediction_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each example `[B]` in float32, of predictions and targets `[B, ...]`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def denoise_itm_loss(own: Tensor, hard: Tensor, temperature: float) -> Tensor:
    """Image-text matching by the denoiser's own error: -log p(own caption) of each pair `[N]`.

    A true caption should help to predict the noise more than one that is nearly true (Diffusion Classifier, Li et al.,
    ICCV 2023; with hard negatives as a loss: Krojer et al., NeurIPS 2023). The errors are compared as shares of the own
    one, so that one temperature does at every timestep: softplus(-(hard - own) / (temperature * own)), where the own
    error that divides takes no gradient.

    Args:
        own: `[N]` errors under the own caption.
        hard: `[N]` errors for the same noisy latents under hard-negative captions.
        temperature: > 0.
    """
    return F.softplus((own - hard) / (temperature * own.detach()))


def denoise_dpo_loss(
    own: Tensor, hard: Tensor, own_reference: Tensor, hard_reference: Tensor, temperature: float
) -> Tensor:
    """Preference of a picture over its hard negative under one caption: -log p(own picture) of each pair `[N]`.

    Diffusion-DPO (Wallace et al., CVPR 2024, equation 14) with a hard negative for the picture that lost: against the
    reference the own picture must be predicted better, or the other worse. As in `denoise_itm_loss` errors are shares
    of the own one, here the reference's: softplus(((own - own_ref) - (hard - hard_ref)) / (temperature * own_ref)).

    Args:
        own, hard: `[N]` errors of both pictures at the same noise under the caption of the first.
        own_reference, hard_reference: `[N]` likewise, of the model without its LoRA; they take no gradient.
        temperature: > 0.
    """
    own_reference, hard_reference = own_reference.detach(), hard_reference.detach()
    return F.softplus(((own - own_reference) - (hard - hard_reference)) / (temperature * own_reference))


def _min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)  # also right at SNR 0, where min(SNR, gamma) / SNR would be 0 / 0
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1.0)
    raise InputError(f"snr_gamma is not defined for prediction type `{prediction_type}`; leave snr_gamma out")
