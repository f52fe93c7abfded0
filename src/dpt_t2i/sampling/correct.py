"""Self-correction of one latent: a step up the gradient of the model's own matching score (method section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dpt_t2i.backbones.types import TextStates
from dpt_t2i.errors import InputError

Scorer = Callable[[Tensor, Tensor, TextStates], Tensor]  # (z_t [B, C, h, w], t [B], text) -> scores [B]
Rule = Literal["fixed", "relative"]
SCALE = 2.0**10  # of the score on its way back: in float16 small gradients would vanish; exact, and undone, elsewhere


@runtime_checkable
class PredictingScorer(Protocol):
    """A scorer that can also read its score off the denoiser's own prediction: what a fused correction needs."""

    def __call__(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor: ...
    def predict_and_score(
        self, noisy: Tensor, timesteps: Tensor, text: TextStates, scored: int
    ) -> tuple[Tensor, Tensor]:
        """z_t `[N, C, h, w]` -> predictions `[N, C, h, w]` without a graph; scores of the last `scored` with one."""
        ...


def correct(
    latents: Tensor, timesteps: Tensor, text: TextStates, *, score: Scorer, strength: float, rule: Rule = "fixed"
) -> tuple[Tensor, Tensor]:
    """z_t -> z^_t, and the score of z_t.

    `fixed`: z + strength * g, the paper's. `relative`: z + strength * |z| * g / |g| with the norms of each sample, so
    that the strength means the same for every model; a zero gradient leaves the sample as it is.

    Args:
        latents: the denoiser's input `[B, C, h, w]` (after `scale_model_input`).
        timesteps: `[B]`.
        text: B texts to obey.

    Returns:
        `[B, C, h, w]` and `[B]`, both float32 without a graph. Gradient mode is the function's own affair: it may be
        called under `torch.no_grad`.

    Raises:
        InputError: called under `torch.inference_mode`, or the gradient is not finite (names the step).
    """
    if torch.is_inference_mode_enabled():
        raise InputError("self-correction needs gradients; call it under torch.no_grad, not torch.inference_mode")
    for scale in (SCALE, 1.0):
        with torch.enable_grad():
            point = latents.detach().float().clone().requires_grad_(True)
            scores = score(point, timesteps, text)
            (gradient,) = torch.autograd.grad(scale * scores.sum(), point)
        gradient = gradient / scale
        if bool(torch.isfinite(gradient).all()):
            break
    if not bool(torch.isfinite(gradient).all()):
        step = float(timesteps.flatten()[0])
        raise InputError(f"self-correction: the gradient at timestep {step:g} is NaN or infinite; use dtype float32")
    return _step(point.detach(), gradient, strength, rule), scores.detach().float()


def predict_and_correct(
    latents: Tensor,
    timesteps: Tensor,
    text: TextStates,
    null: TextStates | None,
    *,
    scorer: PredictingScorer,
    strength: float,
    rule: Rule = "fixed",
) -> tuple[Tensor, Tensor, Tensor]:
    """`correct`, with its gradient from the pass that predicts: predictions at z_t, z^_t, and the scores of z_t.

    Args:
        null: texts of the unconditional branch; it goes through the same pass, and its predictions `[B, C, h, w]` come
            before the conditional ones. None = no such branch.
    """
    predictions: list[Tensor] = []

    def score(point: Tensor, steps: Tensor, states: TextStates) -> Tensor:
        if null is not None:
            noisy, steps, texts = torch.cat([latents, point]), steps.repeat(2), TextStates.cat([null, states])
        else:
            noisy, texts = point, states
        prediction, scores = scorer.predict_and_score(noisy, steps, texts, len(point))
        predictions.append(prediction)
        return scores

    moved, scores = correct(latents, timesteps, text, score=score, strength=strength, rule=rule)
    return predictions[0], moved, scores


def _step(point: Tensor, gradient: Tensor, strength: float, rule: Rule) -> Tensor:
    if rule == "fixed":
        return point + strength * gradient
    length, slope = (value.flatten(1).norm(dim=1)[:, None, None, None] for value in (point, gradient))
    direction = torch.where(slope > 0, gradient / torch.where(slope > 0, slope, 1.0), 0.0)
    return point + strength * length * direction
