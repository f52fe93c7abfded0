"""The two places of a diffusers pipeline at which a correction can enter: between steps, and before the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor, nn

from dpt_t2i.errors import InputError
from dpt_t2i.sampling.guide import Guide
from dpt_t2i.sampling.loop import check_corrected_steps
from dpt_t2i.sampling.schedulers import input_scale, move_state


class StateCallback(PipelineCallback):
    """diffusers calls it after step i with the latents of step i + 1, and goes on with those that it returns.

    Attributes:
        scores: (timestep, scores `[B]` before the correction) of every corrected step so far.
    """

    def __init__(self, guide: Guide) -> None:
        super().__init__()
        self.guide = guide
        self.scores: list[tuple[float, Tensor]] = []
        self._first = 0  # of the schedule, the place at which this call of the pipeline begins

    @property
    def tensor_inputs(self) -> list[str]:
        """What the pipeline hands over; most pipelines ask for this themselves."""
        return ["latents", "prompt_embeds"]

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Correct `latents` for the step that comes next; after the last there is none."""
        scheduler = pipeline.scheduler
        if step_index == 0:  # the first of equal timesteps, which only the last ones may be
            self._first = _nearest(scheduler.timesteps, timesteps)
        steps = _steps(pipeline, self._first)
        if step_index == 0:
            check_corrected_steps(self.guide.config, steps, first=1)
        if step_index + 1 < steps and self.guide.wanted(step_index + 1, steps):
            timestep = scheduler.timesteps[self._first + step_index + 1]
            latents: Tensor = callback_kwargs["latents"]
            z = latents.float() * input_scale(scheduler, timestep)
            moved, scores = self.guide.correct(z, timestep, callback_kwargs.get("prompt_embeds"))
            callback_kwargs["latents"] = move_state(scheduler, latents.float(), moved, timestep).to(latents.dtype)
            self.scores.append((float(timestep), scores))
        return callback_kwargs


@dataclass(frozen=True)
class _Correction:
    """Of the step at work, which some pipelines give the denoiser in several passes."""

    place: int  # in the schedule
    given: Tensor  # [B, ...] the denoiser inputs
    moved: Tensor  # [B, ...] the corrected ones
    both_branches: bool  # of guidance were in the pass


class DenoiserHook:
    """Corrects the denoiser's input, and in mode `state` also the latents that the sampler steps from.

    Attributes:
        scores: (timestep, scores `[B]` before the correction) of every corrected step so far.
    """

    def __init__(self, guide: Guide) -> None:
        self.guide = guide
        self.scores: list[tuple[float, Tensor]] = []
        self._scoring = False  # the score is itself a pass of the denoiser, which is not to be corrected again
        self._last: _Correction | None = None
        self._moved: Tensor | None = None  # the denoiser input that the coming step of the sampler starts from
        self._schedule: Tensor | None = None  # of the pipeline's call at work
        self._first = 0  # of it, the place at which the call began

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooked into denoiser and sampler within the `with`, and out of both after it.

        Raises:
            InputError: within another hook's `with`.
        """
        denoiser, scheduler = self.guide.backbone.denoiser, self.guide.backbone.pipeline.scheduler
        if any(isinstance(getattr(h, "__self__", None), DenoiserHook) for h in denoiser._forward_pre_hooks.values()):
            raise InputError("the pipeline is corrected already; end the `with` of the other `hooked` first")
        before = scheduler.__dict__.get("step")  # another tool's
        handle = denoiser.register_forward_pre_hook(self._before_denoiser, with_kwargs=True)
        if self.guide.config.correction_mode == "state":
            scheduler.step = self._moving(scheduler)
        # A module compiled in place would trace the hook, whose work is nothing for a graph.
        in_place = getattr(denoiser, "_compiled_call_impl", None) is not None
        plain = torch.compiler.set_stance("force_eager") if in_place else nullcontext()
        try:
            with plain:
                yield
        finally:
            handle.remove()
            self._last = self._moved = None
            scheduler.__dict__.pop("step", None)  # the class's own method shows again
            if before is not None:
                scheduler.step = before

    def _before_denoiser(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._scoring:
            return None
        name = "sample" if "sample" in kwargs else "hidden_states"
        latents: Tensor = args[0] if args else kwargs[name]
        given: Any = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timestep = torch.as_tensor(given).flatten()[0].float() * self.guide.backbone.pipeline_call.timestep_scale
        pipeline = self.guide.backbone.pipeline
        place = self._follow(pipeline.scheduler, timestep)
        steps = _steps(pipeline, self._first)
        if place == self._first:
            check_corrected_steps(self.guide.config, steps)
        if not self.guide.wanted(place - self._first, steps):
            return None
        self.guide.check_places(kwargs.get("img_ids"))
        corrected = self._correct(latents, place, kwargs.get("encoder_hidden_states"))
        return ((corrected, *args[1:]), kwargs) if args else (args, kwargs | {name: corrected})

    def _follow(self, scheduler: Any, timestep: Tensor) -> int:
        """The place in the schedule of the step at work; remembers where each call of the pipeline began."""
        counted = getattr(scheduler, "step_index", None)  # None before its first step, and of samplers that count none
        counted = getattr(scheduler, "begin_index", None) if counted is None else counted
        place = _nearest(scheduler.timesteps, timestep) if counted is None else int(counted)
        if scheduler.timesteps is not self._schedule:  # each call makes its own
            self._schedule, self._first, self._last = scheduler.timesteps, place, None
        return place

    def _correct(self, latents: Tensor, place: int, tokens: Tensor | None) -> Tensor:
        """All rows of the denoiser's batch, with the correction in those that the mode says."""
        images = len(latents) if self.guide.images is None else self.guide.images
        noise_mode = self.guide.config.correction_mode == "noise"
        last = self._last
        if last is not None and last.place == place and torch.equal(latents, last.given):
            # Once more the same latents: SD3's pass without some layers, which is conditional, behind both branches;
            # or the negative branch that FLUX passes behind the other.
            self._moved = None if noise_mode else last.moved
            return latents if noise_mode and not last.both_branches else last.moved.to(latents.dtype)
        pipeline = self.guide.backbone.pipeline
        guided = _is_guided(pipeline, latents, tokens, images, begun=place > self._first)
        if len(latents) != (2 * images if guided else images):
            raise _other_count(len(latents) // (1 + guided), images)
        exact = pipeline.scheduler.timesteps[place]  # what the denoiser is given may be rounded to its dtype
        self._scoring = True
        try:
            moved, scores = self.guide.correct(latents[-images:], exact, tokens)
        finally:
            self._scoring = False
        self.scores.append((float(exact), scores))
        self._last = _Correction(place, latents[-images:], moved, guided)
        self._moved = None if noise_mode else moved
        half = moved.to(latents.dtype)
        return torch.cat([latents[:images] if noise_mode else half, half]) if guided else half

    def _moving(self, scheduler: Any) -> Callable[..., Any]:
        """The sampler's `step`, from the latents whose denoiser input is the corrected one.

        Its signature stays to be seen: pipelines look there for `eta` and `generator`.
        """
        step: Callable[..., Any] = scheduler.step

        @wraps(step)
        def moving(output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            moved, self._moved = self._moved, None
            if moved is not None:
                if moved.shape != sample.shape:
                    raise _other_count(len(sample), len(moved))
                sample = move_state(scheduler, sample.float(), moved, timestep).to(sample.dtype)
            return step(output, timestep, sample, *args, **kwargs)

        return moving


def _steps(pipeline: Any, first: int) -> int:
    """Of the call: image to image leaves out the first of the schedule's, SDXL's `denoising_end` the last."""
    return int(getattr(pipeline, "num_timesteps", None) or len(pipeline.scheduler.timesteps) - first)


def _nearest(schedule: Tensor, timestep: Any) -> int:
    """Place of `timestep`, which may be rounded; the first of equal ones."""
    return int((schedule.float() - torch.as_tensor(timestep).to(schedule.device).float()).abs().argmin())


def _is_guided(pipeline: Any, latents: Tensor, tokens: Tensor | None, images: int, begun: bool) -> bool:
    """Does the batch hold both branches of classifier-free guidance, each latent twice?

    Most pipelines say so. Of one that does not (PixArt's), the batch does: its halves are equal and their texts are
    not. Before the first step (`begun` false) so can `images` from one seed be.
    """
    told = getattr(pipeline, "do_classifier_free_guidance", None)
    if told is not None:
        return bool(told)
    half, odd = divmod(len(latents), 2)
    if odd or not torch.equal(latents[:half], latents[half:]):
        return False
    differ = tokens is None or not torch.equal(tokens[:half], tokens[half:])
    return differ and (begun or len(latents) != images)


def _other_count(made: int, told: int) -> InputError:
    return InputError(
        f"the pipeline makes {made} image{'' if made == 1 else 's'}, but self-correction was told of {told}; give "
        "`hooked` the prompts and `num_images_per_prompt` of the call"
    )
