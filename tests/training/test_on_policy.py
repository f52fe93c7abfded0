"""Which rows the model's own samples replace, and with what. A painter samples: prompt n gives shade 100 + n."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from dpt_t2i.config import ItmRecConfig, SampleConfig
from dpt_t2i.data.examples import Batch, Examples, collate
from dpt_t2i.data.records import Expression, Record
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.generate import Job
from dpt_t2i.training import on_policy
from dpt_t2i.training.on_policy import OnPolicy

COUNT = 40


def shade(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, level))


def level_of(pixels: torch.Tensor) -> int:
    return round((pixels.mean().item() + 1) * 127.5)


def record(index: int) -> Record:
    expression = Expression(f"thing {index}", ((0, 5),), ((0.0, 0.0, 8.0 * (index + 1) / COUNT, 8.0),))
    return Record(str(index), "toy", lambda: shade(index), (f"picture {index}",), (expression,))


class Painter:
    """Stands in for `generate`, and remembers its jobs and the denoiser's mode, call by call."""

    def __init__(self) -> None:
        self.calls: list[list[Job]] = []
        self.modes: list[bool] = []
        self.settings: list[SampleConfig] = []

    def __call__(self, backbone: Any, jobs: Sequence[Job], settings: Any, **size: int) -> Iterator[SimpleNamespace]:
        assert size == {"height": 8, "width": 8} and not torch.is_grad_enabled()
        self.calls.append(list(jobs))
        self.settings.append(settings)
        self.modes.append(backbone.denoiser.training)
        for job in jobs:
            yield SimpleNamespace(image=shade(100 + int(job.prompt.split()[1])))


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    painter = Painter()
    monkeypatch.setattr(on_policy, "generate", painter)
    return painter


EXAMPLES = Examples([record(i) for i in range(COUNT)], 8)


def batch_of(positions: Sequence[int]) -> Batch:
    return collate([EXAMPLES[position] for position in positions])


def policy(fraction: float, every: int = 100, pool: int = 5, seed: int = 0, steps: int = 20) -> OnPolicy:
    loss = ItmRecConfig(on_policy_fraction=fraction, on_policy_every=every, on_policy_pool=pool, on_policy_steps=steps)
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    backbone: Any = SimpleNamespace(name="toy", denoiser=nn.Linear(1, 1), pipeline=SimpleNamespace(scheduler=scheduler))
    made = OnPolicy.of(loss, backbone, EXAMPLES, seed)
    assert made is not None
    return made


def test_more_steps_than_timesteps_are_refused_before_training():
    with pytest.raises(InputError, match="on_policy_steps 1001: base `toy` has 1000 timesteps"):
        policy(1.0, steps=1001)


def test_no_fraction_no_policy():
    assert OnPolicy.of(ItmRecConfig(on_policy_fraction=0.0), SimpleNamespace(), EXAMPLES, 0) is None  # type: ignore[arg-type]


def test_with_fraction_one_every_row_is_of_the_pool_and_whole(painter):
    batch = policy(1.0)(3, batch_of(range(16)))
    prompts = {job.prompt for job in painter.calls[0]}
    assert len(painter.calls[0]) == 5 and len(batch) == 16
    assert set(batch.captions) <= prompts and len(set(batch.captions)) > 1
    assert batch.has_hard_image.all() and not batch.has_hard_caption.any()
    for row in range(16):
        number = int(batch.captions[row].split()[1])
        assert batch.records[row] == number
        assert level_of(batch.images[row]) == number, "the true picture of the caption"
        assert level_of(batch.hard_images[row]) == 100 + number, "against the model's own"
        assert batch.random_captions[row] == f"picture {level_of(batch.random_images[row])}" != batch.captions[row]
        assert batch.expressions[row] == f"thing {number}" and batch.spans[row] == ((0, 5),)
        wide = (number + 1) / COUNT
        assert batch.boxes[row][0].tolist() == pytest.approx([wide / 2, 0.5, wide, 1])


def test_of_an_own_sample_no_caption_is_known_to_be_true(painter, monkeypatch):
    made = policy(1.0)
    pairs = [replace(item, hard_caption="false", hard_pair=True) for item in made._items(0)]
    monkeypatch.setattr(made, "_items", lambda current: pairs)
    batch = made(0, batch_of(range(4)))
    assert batch.has_hard_caption.all() and batch.has_hard_image.all() and not batch.hard_pair.any()


def test_rows_that_are_not_chosen_stay_as_they_were(painter):
    before = batch_of(range(COUNT))
    after = policy(0.5)(0, before)
    chosen = after.has_hard_image  # no record of the source has one
    assert 10 < chosen.sum() < 30  # 20 expected, standard deviation 3.2
    for row in (~chosen).nonzero().flatten().tolist():
        assert after.captions[row] == before.captions[row] and after.records[row] == before.records[row]
        assert torch.equal(after.images[row], before.images[row])
        assert torch.equal(after.random_images[row], before.random_images[row])
    assert before.has_hard_image.sum() == 0, "the batch that came in is not written to"


def test_what_was_left_out_is_told_whichever_rows_are_exchanged(painter):
    batch = replace(batch_of(range(2)), skipped=("of the batch",))
    made = policy(1.0)
    made._pool, made._round = [replace(made.examples[0], skipped=("of the pool",))], 0
    assert made(0, batch).skipped == ("of the batch", "of the pool", "of the pool")
    assert policy(0.01, seed=3)(0, batch).skipped == ("of the batch",)


def test_the_choice_does_not_depend_on_how_the_batch_is_cut(painter):
    whole = policy(0.5)(7, batch_of(range(8)))
    second = policy(0.5)
    parts = [second(7, batch_of(range(start, start + 2))) for start in (0, 2, 4, 6)]
    assert 0 < whole.has_hard_image.sum() < 8
    for name in ("captions", "random_captions", "expressions", "records"):
        assert getattr(whole, name) == tuple(value for part in parts for value in getattr(part, name))
    for name in ("images", "hard_images", "random_images", "has_hard_image", "has_random_image"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert len(painter.calls) == 2, "one pool for all parts of a step"


def test_steps_and_seeds_choose_differently(painter):
    def chosen(step: int, seed: int) -> list[bool]:
        return policy(0.5, seed=seed)(step, batch_of(range(COUNT))).has_hard_image.tolist()

    assert chosen(1, 0) == chosen(1, 0)
    assert len({tuple(chosen(step, seed)) for step in (1, 2) for seed in (0, 1)}) == 4


def test_the_pool_is_drawn_again_every_n_steps(painter):
    running = policy(1.0, every=3)
    drawn = []
    for step in range(8):
        running(step, batch_of([0]))
        drawn.append(len(painter.calls))
    assert drawn == [1, 1, 1, 2, 2, 2, 3, 3]
    noises = [[job.noise_seed for job in call] for call in painter.calls]
    assert len({seed for call in noises for seed in call}) == 15, "no sample shares its noise with another"
    assert len({tuple(job.prompt for job in call) for call in painter.calls}) == 3
    policy(1.0, every=3)(4, batch_of([0]))  # a run that goes on from step 4 asks for round 1 again
    assert painter.calls[-1] == painter.calls[1]


@pytest.mark.parametrize("training", [True, False])
def test_samples_are_drawn_in_eval_mode_and_the_mode_comes_back(painter, training):
    running = policy(1.0)
    running.backbone.denoiser.train(training)
    running(0, batch_of([0]))
    assert painter.modes == [False]
    assert running.backbone.denoiser.training is training


def test_samples_are_drawn_as_the_config_says(painter):
    loss = ItmRecConfig(
        on_policy_fraction=1.0, on_policy_pool=2, on_policy_steps=7, on_policy_guidance=1.5, on_policy_eta=0.5
    )
    OnPolicy(loss, SimpleNamespace(denoiser=nn.Linear(1, 1)), EXAMPLES, 0)(0, batch_of(range(2)))  # type: ignore[arg-type]
    (how,) = painter.settings
    assert (how.steps, how.guidance_scale, how.eta) == (7, 1.5, 0.5)


def test_a_kept_pool_is_taken_up_where_it_was(painter, tmp_path):
    first = policy(0.5, every=10)
    first.save(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is drawn yet"
    first(12, batch_of(range(16)))
    first.save(tmp_path)
    assert len(painter.calls) == 1
    again = policy(0.5, every=10)
    again.load(tmp_path)
    want, got = first(13, batch_of(range(16))), again(13, batch_of(range(16)))
    assert len(painter.calls) == 1, "of the same round: nothing is drawn anew"
    assert torch.equal(want.hard_images, got.hard_images) and want.captions == got.captions
    assert want.has_hard_image.any()
    again(20, batch_of(range(16)))
    assert len(painter.calls) == 2, "the next round has a pool of its own"
