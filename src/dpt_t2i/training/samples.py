"""Did anything change? The same prompts and seeds every N steps: base, tuned, tuned with correction, side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.lora import lora_change, lora_disabled
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import CorrectionConfig, SampleConfig, SamplesConfig
from dpt_t2i.files import save_picture
from dpt_t2i.sampling.generate import generate, jobs_of
from dpt_t2i.sampling.schedulers import check_steps
from dpt_t2i.sampling.scoring import MatchScorer

FOLDER = "samples"
SIDE, LINE = 256, 14  # pixels of the largest cell, and of a line of text

log = logging.getLogger(__name__)


class Samples:
    """Calling it with a step writes `samples/step-N.png` and returns `lora_norm` and `image_change`.

    Args:
        adapter: None = without the column of corrected images.
        prompts: of the rows.
        folder: the run's.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: DiscriminativeAdapter | None,
        taps: Sequence[Tap],
        prompts: Sequence[str],
        settings: SamplesConfig,
        folder: Path,
    ) -> None:
        check_steps(backbone, settings.sample_steps, "sample_steps")
        self.backbone, self.adapter, self.taps, self.folder = backbone, adapter, taps, folder
        self.jobs = jobs_of(prompts, [0])
        self.settings = SampleConfig(
            steps=settings.sample_steps, guidance_scale=settings.sample_guidance, eta=settings.sample_eta
        )
        self.strength = settings.sample_correct
        self._base: list[Image.Image] | None = None  # drawn once: it never changes

    def __call__(self, step: int) -> dict[str, float]:
        """Figures: norm of the LoRA's change of the weights it sits on over the norm of these weights, and the mean
        difference of tuned images from the base's, in levels of 255."""
        was_training = self.backbone.denoiser.training
        self.backbone.denoiser.eval()
        if self._base is None:
            with lora_disabled(self.backbone):
                self._base = self._draw()
        columns = {"base": self._base, "tuned": self._draw()}
        if self.adapter is not None and self.strength:
            correction = CorrectionConfig(correct=self.strength, correction_rule="relative")
            scorer = MatchScorer(self.backbone, self.adapter, self.taps)
            columns["tuned + correction"] = self._draw(correction, scorer)
        self.backbone.denoiser.train(was_training)
        path = self.folder / FOLDER / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(sheet([job.prompt for job in self.jobs], columns), path)
        figures = {"lora_norm": lora_change(self.backbone), "image_change": _difference(self._base, columns["tuned"])}
        log.info(
            "step %d: the LoRA changes its weights by %.3g %%, the images by %.3g of 255 levels; %s",
            step, 100 * figures["lora_norm"], figures["image_change"], path,
        )  # fmt: skip
        return figures

    def _draw(self, correction: CorrectionConfig | None = None, scorer: MatchScorer | None = None) -> list[Image.Image]:
        return [made.image for made in generate(self.backbone, self.jobs, self.settings, correction, scorer)]


def sheet(prompts: Sequence[str], columns: dict[str, list[Image.Image]]) -> Image.Image:
    """A row a prompt, a column an arm, each with its name."""
    cells = [[_cell(image) for image in images] for images in columns.values()]
    width, height = cells[0][0].size
    page = Image.new("RGB", (len(columns) * width, LINE + len(prompts) * (height + LINE)), "white")
    draw = ImageDraw.Draw(page)
    for column, name in enumerate(columns):
        draw.text((column * width + 2, 1), name, fill="black")
        for row, cell in enumerate(cells[column]):
            page.paste(cell, (column * width, 2 * LINE + row * (height + LINE)))
    for row, prompt in enumerate(prompts):
        text = prompt.encode("latin-1", "replace").decode("latin-1")  # all that Pillow's own font may know
        draw.text((2, LINE + row * (height + LINE) + 1), text, fill="black")
    return page


def _cell(image: Image.Image) -> Image.Image:
    """Small images grow by whole pixels, so that they stay sharp; large ones shrink."""
    factor = SIDE / max(image.size)
    if factor >= 2:
        return image.resize((image.width * int(factor), image.height * int(factor)), Image.Resampling.NEAREST)
    return image.resize((round(image.width * min(1.0, factor)), round(image.height * min(1.0, factor))))


def _difference(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> float:
    pairs = [
        (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)) for a, b in zip(one, other, strict=True)
    ]
    return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))
