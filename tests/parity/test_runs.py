"""Where whole runs part from the release's (docs/deviations.md): no golden can hold them; its lines stand here again.

They are those of data/dataset/refcoco.py, train_stage1.py and evaluation.py at commit 7a3fdae.
"""

import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import RandomSampler

from dpt_t2i.config import SampleConfig
from dpt_t2i.data.examples import Examples, MicroBatches, Part
from dpt_t2i.data.records import Record
from dpt_t2i.evaluation.examples import EvalExample
from dpt_t2i.evaluation.itm import itm_scores
from dpt_t2i.sampling.generate import generate, jobs_of
from dpt_t2i.sampling.scoring import MatchScorer
from dpt_t2i.training.checkpoint import STATE, find_checkpoint
from tests.tiny import tiny_adapter, tiny_backbone

BACKBONE = tiny_backbone()


def record(index: int) -> Record:
    return Record(str(index), "toy", lambda: Image.new("RGB", (8, 8), (60 * index,) * 3), (f"picture {index}",))


def test_differs_a_random_negative_is_another_record() -> None:
    """Of four records, for the first: theirs is the first itself in a third of the texts and a quarter of the images,
    and never the last text; ours is each of the others alike."""
    draws, last_id = 1200, 3
    theirs = np.random.default_rng(0)
    texts, images = theirs.integers(0, last_id, draws), theirs.integers(0, 4, draws)
    assert (texts == 0).mean() == pytest.approx(1 / 3, abs=0.05) and (texts == last_id).mean() == 0
    assert (images == 0).mean() == pytest.approx(1 / 4, abs=0.05)
    examples = Examples([record(index) for index in range(4)], 8)
    items = [examples.item(epoch, 0) for epoch in range(draws)]
    ours = np.array([int(item.random_caption.split()[-1]) for item in items])
    shown = np.array([round(float(item.random_pixels[0, 0, 0] + 1) * 127.5) // 60 for item in items])
    for drawn in (ours, shown):
        shares = [(drawn == index).mean() for index in range(4)]
        assert shares == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.05) and shares[0] == 0


def test_differs_a_run_resumes_only_on_request(tmp_path: Path) -> None:
    """Theirs takes the highest number in its log folder, unasked, whole or not; ours a whole one, where it is asked."""
    for name in ("checkpoint-2", "checkpoint-10"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-2" / STATE).write_text('{"step": 2}')
    names = [name for name in os.listdir(tmp_path) if name.startswith("checkpoint")]
    assert max(names, key=lambda name: int(name.split("-")[1])) == "checkpoint-10"
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"


def test_differs_a_resumed_run_sees_what_was_left_of_the_epoch() -> None:
    """Stopped after 4 of 8 examples: theirs draws a new order and skips its first 4, so that some come twice in the
    epoch and some never; ours goes on in the same order."""
    torch.manual_seed(0)
    before = list(RandomSampler(range(8)))[:4]
    torch.randn(16)  # what training draws between the epoch's order and the checkpoint, whose state is restored
    after = list(RandomSampler(range(8)))[4:]
    assert len({*before, *after}) == 6, "two came twice, two never"
    examples = Examples([record(index) for index in range(8)], 8)

    def seen(first: int, stop: int) -> list[int]:
        return [examples[position].record for position in chain(*MicroBatches(Part(2, first_step=first, steps=stop)))]

    assert seen(0, 2) + seen(2, 4) == seen(0, 4) and len({*seen(0, 4)}) == 8


@torch.no_grad()
def test_differs_an_image_does_not_depend_on_its_neighbours() -> None:
    """Theirs draws the noise of all images from one generator a process: with a second process, or one image less, an
    image starts from another's noise. Ours are the same."""
    shape, prompts = (4, 8, 8), ["a red star", "a blue circle", "two green squares"]

    def released(images: int) -> Tensor:
        return torch.randn(images, *shape, generator=torch.Generator().manual_seed(42))

    alone, second_process = released(3)[1], released(1)[0]  # of the second prompt
    assert float((alone - second_process).abs().max()) > 1
    assert torch.equal(second_process, released(3)[0]), "it is the first prompt's"

    jobs = jobs_of(prompts, [42])
    whole = {made.job: made.latents for made in generate(BACKBONE, jobs, SampleConfig(steps=2, batch_size=3))}
    for part in (jobs[1:], jobs[1:2]):
        for made in generate(BACKBONE, part, SampleConfig(steps=2, batch_size=1)):
            torch.testing.assert_close(made.latents, whole[made.job], rtol=0, atol=1e-4)


@torch.no_grad()
def test_differs_an_evaluation_repeats() -> None:
    """Theirs samples the VAE's posterior and draws new noise for each text: measured twice, scores differ. Ours take
    the posterior's mean and the example's own noise, and are the same to the bit."""
    judge = MatchScorer(BACKBONE, tiny_adapter(BACKBONE), BACKBONE.parse_taps("up1"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pixels = torch.rand(3, 32, 32) * 2 - 1
        texts, vae = ("a red star", "a blue star"), BACKBONE.pipeline.vae

        def released() -> list[float]:
            scores = []
            for text in texts:
                noise = torch.randn(1, 4, 8, 8)
                latents = vae.encode(pixels[None]).latent_dist.sample() * vae.config.scaling_factor
                noisy, t = BACKBONE.add_noise(latents, noise, torch.tensor([500])), torch.tensor([500])
                scores.append(float(judge(noisy, t, BACKBONE.encode_text([text]))))
            return scores

        first, again = released(), released()
    example = EvalExample("x", pixels, texts[0], hard_caption=texts[1])
    (ours,) = itm_scores(judge, [example], [500])
    assert max(abs(a - b) for a, b in zip(first, again, strict=True)) > 1e-3
    assert itm_scores(judge, [example], [500]) == [ours]
    assert torch.equal(BACKBONE.encode_image(pixels[None]), vae.encode(pixels[None]).latent_dist.mode() * 0.18215)
