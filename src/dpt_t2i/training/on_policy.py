"""On-policy negatives: the model's own sample for a caption against a true picture of it, without an outside judge.

A share of the examples comes from a pool whose hard-negative image is what the model itself draws for the caption; the
pool is drawn again every so many steps, so that it follows the model; a checkpoint keeps it, for the model that drew it
is gone by then. Some of its samples are right: the loss then asks
for the true picture to score higher still, which is noise that the method bears.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.config import ItmRecConfig, SampleConfig
from dpt_t2i.data.examples import Batch, Examples, Item, collate
from dpt_t2i.data.streams import ShardStream
from dpt_t2i.data.transforms import to_pixels
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.generate import generate, jobs_of
from dpt_t2i.sampling.schedulers import check_steps

FILE = "on_policy.safetensors"


class OnPolicy:
    """Calling it with (step, batch) replaces a share of the batch by examples of the pool."""

    def __init__(self, loss: ItmRecConfig, backbone: Backbone, examples: Examples, seed: int) -> None:
        self.loss, self.backbone, self.examples, self.seed = loss, backbone, examples, seed
        self._round, self._images, self._pool = -1, list[Image.Image](), list[Item]()

    @staticmethod
    def of(loss: ItmRecConfig, backbone: Backbone, examples: Examples | ShardStream, seed: int) -> OnPolicy | None:
        """None where the config asks for none.

        Raises:
            InputError: the examples are streamed or of several shapes: a pool is drawn at random, and of squares; or
                more steps than the base has timesteps.
        """
        if loss.on_policy_fraction == 0:
            return None
        if not isinstance(examples, Examples) or examples.buckets is not None:
            raise InputError("on_policy_fraction does not go with streamed shards or aspect_buckets; leave out one")
        check_steps(backbone, loss.on_policy_steps, "on_policy_steps")
        return OnPolicy(loss, backbone, examples, seed)

    def __call__(self, step: int, batch: Batch) -> Batch:
        current = step // self.loss.on_policy_every
        if current != self._round:
            self._round, self._images = current, self._draw(current)
            self._pool = self._with(self._images)
        rows = {}
        for row, record in enumerate(batch.records):  # by record, so that batches may be cut in any way
            rng = np.random.default_rng([self.seed, step, record])
            if rng.random() < self.loss.on_policy_fraction:
                rows[row] = self._pool[int(rng.integers(len(self._pool)))]
        return _replace_rows(batch, rows)

    def save(self, folder: Path) -> None:
        """Write the pool's pictures; nothing before the first round."""
        if self._images:
            pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in self._images]))
            save_file({"pixels": pixels}, folder / FILE, metadata={"round": str(self._round)})

    def load(self, folder: Path) -> None:
        """Take up the pool that `save` wrote; without one a pool is drawn at the next step."""
        if (folder / FILE).is_file():
            with safe_open(folder / FILE, framework="pt") as file:
                self._round = int(file.metadata()["round"])
                self._images = [Image.fromarray(picture) for picture in file.get_tensor("pixels").numpy()]
            self._pool = self._with(self._images)

    def _items(self, current: int) -> list[Item]:
        """The examples of this round."""
        rng = np.random.default_rng([self.seed, 77, current])
        rows = rng.integers(len(self.examples.records), size=self.loss.on_policy_pool).tolist()
        return [self.examples.item(current, row) for row in rows]

    def _with(self, images: list[Image.Image]) -> list[Item]:
        """The examples of this round with the model's own sample as hard image, of which no caption is known."""
        items = zip(self._items(self._round), images, strict=True)
        return [replace(item, hard_pixels=to_pixels(image), hard_pair=False) for item, image in items]

    @torch.no_grad()
    def _draw(self, current: int) -> list[Image.Image]:
        """The model's own samples for the captions of this round."""
        items = self._items(current)
        was_training = self.backbone.denoiser.training
        self.backbone.denoiser.eval()
        side = items[0].pixels.shape[-1]
        sampling = SampleConfig(
            steps=self.loss.on_policy_steps,
            guidance_scale=self.loss.on_policy_guidance,
            eta=self.loss.on_policy_eta,
            batch_size=16,
        )
        jobs = [job for i, item in enumerate(items) for job in jobs_of([item.caption], [1_000_000 * current + i])]
        drawn = [made.image for made in generate(self.backbone, jobs, sampling, height=side, width=side)]
        self.backbone.denoiser.train(was_training)
        return drawn


def _replace_rows(batch: Batch, items: dict[int, Item]) -> Batch:
    """The batch with some rows exchanged."""
    if not items:
        return batch
    rows = list(items)
    new = collate(list(items.values()))

    def mixed(name: str) -> Any:
        old, fresh = getattr(batch, name), getattr(new, name)
        if isinstance(old, Tensor):
            return old.index_copy(0, torch.tensor(rows), fresh)
        values = dict(enumerate(old)) | dict(zip(rows, fresh, strict=True))
        return tuple(values.values())

    by_row: dict[str, Any] = {field.name: mixed(field.name) for field in fields(batch) if field.name != "skipped"}
    return replace(batch, **by_row, skipped=batch.skipped + new.skipped)
