"""What the web page does with a model, without the page: draw a prompt in two ways, and judge any picture."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from dpt_t2i.backbones.lora import lora_disabled, lora_parameters
from dpt_t2i.config import CorrectionConfig, GenerateConfig, build_config
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.annotate import annotate
from dpt_t2i.sampling.commands import arm_name
from dpt_t2i.sampling.folder import image_file, write_image
from dpt_t2i.sampling.generate import Job, jobs_of
from dpt_t2i.sampling.judgement import Evidence, Judgement
from dpt_t2i.sampling.loop import Step
from dpt_t2i.sampling.model import T2IModel

Beside = Literal["plain base", "tuned alone", "nothing"]
MAX_SIDE = 4  # times the model's own: whoever reaches the page may ask
Watch = Callable[[float, str], None]  # (share done in [0, 1], what is being drawn)


@dataclass(frozen=True)
class Drawn:
    """One picture that was drawn and kept."""

    image: Image.Image  # as drawn
    file: Path  # PNG with its settings in the text chunk `parameters`
    judgement: Judgement | None  # None without an adapter

    def shown(self, boxes: bool) -> Image.Image:
        """Enlarged by whole pixels where it is small; with the boxes of what the prompt names if `boxes`."""
        return annotate(self.image, self.judgement.marks() if boxes and self.judgement else [])


@dataclass(frozen=True)
class Drawing:
    """What one press of the button gives."""

    seed: int
    steered: Drawn  # as all settings say
    beside: Drawn | None  # the same prompt and seed, drawn more plainly
    curve: tuple[tuple[int, float], ...]  # (step 1.., matching score before the latent was corrected there)


class Session:
    """One model and the folder that keeps what it draws. Calls from several threads wait for each other."""

    def __init__(self, model: T2IModel, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.tuned = bool(lora_parameters(model.backbone))
        self._alone = threading.Lock()

    @property
    def stored_correction(self) -> CorrectionConfig:
        """What is stored with the adapter, else none. Raises `InputError` where that is no correction."""
        origin = None if self.model.adapter is None else self.model.adapter.origin
        return build_config(CorrectionConfig, overrides=(origin.metadata.get("correction") if origin else None) or {})

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        return self.model.backbone.image_size

    def choices(self) -> tuple[Beside, ...]:
        """What a picture can stand beside: without a LoRA the plain base is all that there is."""
        return ("plain base", "tuned alone", "nothing") if self.tuned else ("plain base", "nothing")

    def draw(
        self, prompt: str, seed: int | None, beside: Beside, settings: Mapping[str, Any], watch: Watch | None = None
    ) -> Drawing:
        """Draw `prompt` as `settings` say and, beside it, without correction and search.

        Args:
            seed: of the initial noise; None = any.
            settings: those of `dpt generate` by their flags' names; what is None or missing is left to what is stored
                with the adapter (of a correction), or to its default.
            watch: is told how far it is, before the first step and after each.

        Raises:
            InputError: an empty prompt, sides over `MAX_SIDE` of the model's own, no memory for them, or anything that
                `T2IModel.run` refuses.
        """
        if not prompt.strip():
            raise InputError("the prompt is empty; write what the image should show")
        given = {name: value for name, value in settings.items() if value is not None}
        if (given.get("correct") or 0) > 0:
            given = self.stored_correction.model_dump() | given
        config = build_config(GenerateConfig, overrides=given)
        for name, side, own in zip(("height", "width"), (config.height, config.width), self.sides, strict=True):
            if side is not None and side > MAX_SIDE * own:
                raise InputError(f"{name} {side} is too large here; give at most {MAX_SIDE * own}")
        seed = secrets.randbelow(2**31) if seed is None else seed
        (job,) = jobs_of([prompt.strip()], [seed], config.own_noise)
        passes = config.search.best_of + (beside != "nothing")
        progress = _Progress(config.sample.steps * passes, watch)
        with self._alone:
            job = Job(self._free_number(), job.prompt, job.seed, job.noise_seed)
            curve: list[tuple[int, float]] = []
            other = self._plainly(job, config, beside, progress) if beside != "nothing" else None
            steered = self._one(job, config, progress.step("as asked", curve))
        # In a search the steps of all candidates were told, and no curve is that of the chosen one.
        return Drawing(seed, steered, other, tuple(curve) if config.search.best_of == 1 else ())

    def judge(self, image: Image.Image, prompt: str, timestep: int, draws: int) -> Judgement:
        """As `dpt score`. Raises `InputError` without an adapter, without a prompt, or on an unusable image."""
        with self._alone:
            return self.model.score(image, prompt, timestep, draws)

    def _plainly(self, job: Job, config: GenerateConfig, beside: Beside, progress: _Progress) -> Drawn:
        plain = {
            "correction": CorrectionConfig(),
            "search": config.search.model_copy(update={"best_of": 1}),
            "sample": config.sample.model_copy(update={"lora_draws": True}),
        }
        on_step = progress.step(beside, [])
        return self._one(job, config.model_copy(update=plain), on_step, without_lora=beside == "plain base")

    def _one(
        self, job: Job, config: GenerateConfig, on_step: Callable[[Step], None], without_lora: bool = False
    ) -> Drawn:
        try:
            with lora_disabled(self.model.backbone) if without_lora else contextlib.nullcontext():
                (made,) = self.model.run([job], config, on_step)
        except torch.OutOfMemoryError as error:
            raise InputError("there is not enough memory for this; make the image smaller, or ask for fewer") from error
        settings = self.model.settings(config)
        if without_lora:  # then nothing that was learned had a part in it
            made, settings = replace(made, score=None), settings | {"lora": None, "lora_sizes": [], "adapter": None}
        folder = self.folder / arm_name(config, has_lora=settings["lora"] is not None)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        write_image(folder, job, made, settings)
        # The LoRA judges both: one judge, one scale.
        judgement = None if self.model.scorer is None else self.model.score(made.image, job.prompt)
        return Drawn(made.image, folder / image_file(job), judgement)

    def _free_number(self) -> int:
        """The number of the next prompt: nothing that lies in the folder is drawn over."""
        names = [path.stem.partition("_")[0] for path in self.folder.glob("*/images/*.png")]
        return 1 + max((int(name) for name in names if name.isdecimal()), default=-1)


def evidence_rows(judgement: Judgement | None) -> list[list[str]]:
    """The evidence as a table: phrase, confidence, score of the phrase alone."""
    return [_evidence_row(evidence) for evidence in judgement.phrases] if judgement else []


def _evidence_row(evidence: Evidence) -> list[str]:
    return [evidence.phrase, f"{evidence.confidence:.2f}", f"{evidence.score:.3f}"]


class _Progress:
    """Counts the sampling steps of all passes."""

    def __init__(self, total: int, watch: Watch | None) -> None:
        self.total, self.done = total, 0
        self.watch = watch or (lambda _share, _what: None)

    def step(self, what: str, curve: list[tuple[int, float]]) -> Callable[[Step], None]:
        """For `on_step`: counts, and adds the scores of corrected steps to `curve`."""
        self.watch(self.done / self.total, what)

        def on_step(step: Step) -> None:
            self.done += len(step.latents)  # a search draws several at once
            if step.scores is not None:
                curve.append((step.index + 1, float(step.scores[0])))
            self.watch(min(1.0, self.done / self.total), what)

        return on_step
