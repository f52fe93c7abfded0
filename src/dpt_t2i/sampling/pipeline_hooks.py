"""The two places of a diffusers pipeline at which a correction can enter: between steps, and before the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor, nn

from dpt_t2i.errors import InputError
from dpt_t2i.sampling.guide import Guide
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
        if step_index + 1 < steps and self.guide.wanted(step_index + 1, steps):
            timestep = scheduler.timesteps[self._first + step_index + 1]
            latents: Tensor = callback_kwargs["latents"]
            z = latents.float() * input_scale(scheduler, timestep)
            moved, scores = self.guide.correct(z, timestep, callback_kwargs.get("prompt_embeds"))
            callback_kwargs["latents"] = move_state(scheduler, latents.float(), moved, timestep).to(latents.dtype)
            self.scores.append((float(timestep), scores))
        return callback_kwargs


class DenoiserHook:
    """Corrects the denoiser's input, and in mode `state` also the latents that the sampler steps from.

    Attributes:
        scores: (timestep, scores `[B]` before the correction) of every corrected step so far.
    """

    def __init__(self, guide: Guide) -> None:
        self.guide = guide
        self.scores: list[tuple[float, Tensor]] = []
        self._scoring = False  # the score is itself a pass of the denoiser, which is not to be corrected again
        self._moved: Tensor | None = None  # the denoiser input that the coming step of the sampler starts from
        self._schedule: Tensor | None = None  # of the pipeline's call at work
        self._first = 0  # of it, the place at which the call began

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooked into denoiser and sampler within the `with`, and out of both after it."""
        denoiser, scheduler = self.guide.backbone.denoiser, self.guide.backbone.pipeline.scheduler
        before = scheduler.__dict__.get("step")  # another correction's, or another tool's
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
        if not self.guide.wanted(place - self._first, _steps(pipeline, self._first)):
            return None
        self.guide.check_places(kwargs.get("img_ids"))
        exact = pipeline.scheduler.timesteps[place]  # what the denoiser is given may be rounded to its dtype
        corrected = self._correct(latents, exact, kwargs.get("encoder_hidden_states"))
        return ((corrected, *args[1:]), kwargs) if args else (args, kwargs | {name: corrected})

    def _follow(self, scheduler: Any, timestep: Tensor) -> int:
        """The place in the schedule of the step at work; remembers where each call of the pipeline began."""
        counted = getattr(scheduler, "step_index", None)  # None before its first step, and of samplers that count none
        counted = getattr(scheduler, "begin_index", None) if counted is None else counted
        place = _nearest(scheduler.timesteps, timestep) if counted is None else int(counted)
        if scheduler.timesteps is not self._schedule:  # each call makes its own
            self._schedule, self._first = scheduler.timesteps, place
        return place

    def _correct(self, latents: Tensor, timestep: Tensor, tokens: Tensor | None) -> Tensor:
        """All rows of the denoiser's batch, with the correction in those that the mode says."""
        images = len(latents) if self.guide.images is None else self.guide.images
        # Of a U-Net's pipeline that guides, a batch of as many rows as images is half as many images, twice.
        pipeline = self.guide.backbone.pipeline
        guides = hasattr(pipeline, "unet") and bool(getattr(pipeline, "do_classifier_free_guidance", False))
        if len(latents) not in (() if guides else (images,)) + (2 * images,):
            raise InputError(
                f"the pipeline makes {_images(len(latents))} images, but self-correction was told of {images}; give "
                "`hooked` the prompts and `num_images_per_prompt` of the call"
            )
        self._scoring = True
        try:
            moved, scores = self.guide.correct(latents[-images:], timestep, tokens)
        finally:
            self._scoring = False
        self.scores.append((float(timestep), scores))
        noise_mode = self.guide.config.correction_mode == "noise"
        self._moved = None if noise_mode else moved
        half = moved.to(latents.dtype)
        if len(latents) == images:
            return half
        return torch.cat([latents[:images] if noise_mode else half, half])

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
                    raise InputError(
                        f"the pipeline makes {len(sample)} images, but self-correction was told of {len(moved)}; give "
                        "`hooked` the prompts and `num_images_per_prompt` of the call"
                    )
                sample = move_state(scheduler, sample.float(), moved, timestep).to(sample.dtype)
            return step(output, timestep, sample, *args, **kwargs)

        return moving


def _steps(pipeline: Any, first: int) -> int:
    """Of the call: image to image leaves out the first of the schedule's, SDXL's `denoising_end` the last."""
    return int(getattr(pipeline, "num_timesteps", None) or len(pipeline.scheduler.timesteps) - first)


def _nearest(schedule: Tensor, timestep: Any) -> int:
    """Place of `timestep`, which may be rounded; the first of equal ones."""
    return int((schedule.float() - torch.as_tensor(timestep).to(schedule.device).float()).abs().argmin())


def _images(rows: int) -> str:
    return str(rows) if rows % 2 else f"{rows // 2} or {rows}"
