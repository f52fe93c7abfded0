"""The loop on a model of two numbers, so that every step can be done on paper."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dpt_t2i.config import DataConfig, TrainConfig
from dpt_t2i.data.examples import Batch, Examples
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.errors import InputError
from dpt_t2i.training.checkpoint import checkpoints
from dpt_t2i.training.engine import Job, _draws, _mix, _rate_factor, _step, train
from dpt_t2i.training.objective import Draw
from dpt_t2i.training.trackers import read_metrics

LIKE = torch.zeros(1, 4, 2, 2)


@dataclass
class Coded:
    """Of an encoded batch only what the loop itself looks at."""

    records: tuple[int, ...]
    boxes: int = 0
    slope: tuple[float, float] = (0.0, 0.0)  # gradient of `Plane`

    @property
    def latents(self) -> Tensor:
        return LIKE.expand(3 * len(self), -1, -1, -1)

    @property
    def targets(self) -> Any:
        return SimpleNamespace(num_boxes=lambda: self.boxes)

    def __len__(self) -> int:
        return len(self.records)


class Plane(nn.Module):
    """loss = slope . w, so its gradient is the slope."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.seen: list[tuple[Coded, Draw, float]] = []

    def forward(self, batch: Coded, draw: Draw, num_boxes: float) -> dict[str, Tensor]:
        self.seen.append((batch, draw, num_boxes))
        return {"loss_mse": (self.w * torch.tensor(batch.slope)).sum()}


def encoder(batch: Batch) -> Coded:
    return Coded(batch.records, slope=(3.0, -4.0))


def job(folder: Path, objective: nn.Module | None = None, weight: float = 1.0, **train: Any) -> Job:
    defaults = {"max_train_steps": 4, "train_batch_size": 2, "learning_rate": 0.1, "adam_weight_decay": 0.0}
    return Job(
        objective=objective or Plane(),
        weights={"loss_mse": weight},
        encoder=encoder,  # type: ignore[arg-type]
        examples=Examples(SceneRecords(length=10, size=16), 16),
        train=TrainConfig(**(defaults | train)),
        data=DataConfig(),
        caption_dropout=0.5,
        seed=0,
        output_dir=folder,
        save_artifacts=lambda folder: None,
        load_artifacts=lambda folder: None,
        validate=dict,
    )


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def whole(draws: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.cat([draw.noise for draw in draws]),
        torch.cat([draw.timesteps for draw in draws]),
        torch.cat([draw.drop_caption for draw in draws]),
    )


def test_draws_do_not_depend_on_how_a_step_is_cut(tmp_path):
    one = _draws(job(tmp_path), 5, parts=1, count=4, like=LIKE)
    two = _draws(job(tmp_path), 5, parts=2, count=2, like=LIKE)
    assert [len(draw.timesteps) for draw in one + two] == [4, 2, 2]
    assert one[0].noise.shape == (4, 4, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole(one), whole(two), strict=True))
    assert not torch.equal(two[0].noise, two[1].noise)


def test_draws_differ_by_step_and_by_seed(tmp_path):
    first = job(tmp_path)
    noises = [_draws(j, step, 1, 4, LIKE)[0].noise for j in (first, replace(first, seed=1)) for step in (0, 1, 2)]
    assert all(not torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    assert torch.equal(noises[0], _draws(first, 0, 1, 4, LIKE)[0].noise)


def test_timesteps_reach_both_ends_and_captions_drop_as_often_as_asked(tmp_path):
    noise, timesteps, drop = whole(_draws(job(tmp_path, min_timestep=3, max_timestep=6), 0, 1, 2000, LIKE))
    assert timesteps.unique().tolist() == [3, 4, 5, 6]
    assert abs(drop.float().mean().item() - 0.5) < 0.05  # standard deviation 0.011
    assert abs(noise.std().item() - 1) < 0.02
    assert not _draws(replace(job(tmp_path), caption_dropout=0.0), 0, 1, 50, LIKE)[0].drop_caption.any()
    assert _draws(replace(job(tmp_path), caption_dropout=1.0), 0, 1, 50, LIKE)[0].drop_caption.all()


def test_every_seed_step_and_rank_has_its_own_number():
    numbers = {_mix(seed, step, rank) for seed in range(4) for step in (0, 1, 999_999, 2**31 - 1) for rank in range(8)}
    assert len(numbers) == 4 * 4 * 8
    assert 0 <= min(numbers) and max(numbers) < 2**63


def test_rates(tmp_path):
    def factor(**train: Any) -> list[float]:
        schedule = _rate_factor(job(tmp_path, max_train_steps=8, **train).train)
        return [schedule(step) for step in (0, 2, 4, 8)]

    assert factor(lr_scheduler="constant") == [1, 1, 1, 1]
    assert factor(lr_scheduler="cosine") == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])
    assert factor(lr_scheduler="linear") == pytest.approx([1, 0.75, 0.5, 0])
    assert factor(lr_scheduler="cosine", lr_warmup_steps=4) == pytest.approx([0, 0.5, 1, 0])
    assert factor(lr_scheduler="constant_with_warmup", lr_warmup_steps=4) == pytest.approx([0, 0.5, 1, 1])


def step_once(folder: Path, accelerator: Accelerator, limit: float, *slopes: tuple[float, float], weight: float = 1.0):
    model = Plane()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # w = -gradient after one step
    given = job(folder, model, weight, max_grad_norm=limit)
    window = [(Coded((i,), boxes=1 + 2 * i, slope=slope), None) for i, slope in enumerate(slopes)]
    terms, norm = _step(given, accelerator, model, optimizer, window, 0)  # type: ignore[arg-type]
    return model, terms, norm


def test_a_long_gradient_is_clipped_and_its_own_norm_told(tmp_path, accelerator):
    model, terms, norm = step_once(tmp_path, accelerator, 1.0, (3.0, 4.0))
    assert norm == pytest.approx(5)
    assert model.w.tolist() == pytest.approx([-0.6, -0.8], abs=1e-5)
    assert terms == {"loss_mse": 0.0, "loss": 0.0}  # taken at w = 0


def test_a_short_gradient_is_left_alone(tmp_path, accelerator):
    model, _, norm = step_once(tmp_path, accelerator, 10.0, (3.0, 4.0))
    assert norm == pytest.approx(5) and model.w.tolist() == [-3, -4]


def test_a_window_is_averaged_weighted_and_shares_its_boxes(tmp_path, accelerator):
    model, _, norm = step_once(tmp_path, accelerator, 100.0, (6.0, 0.0), (0.0, 8.0), weight=2.0)
    assert model.w.tolist() == [-6, -8] and norm == pytest.approx(10)  # 2 x the mean of both slopes
    assert [boxes for _, _, boxes in model.seen] == [2, 2]  # 1 and 3 boxes


def test_a_step_without_boxes_divides_by_one(tmp_path, accelerator):
    model = Plane()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    window: Any = [(Coded((0,)), None), (Coded((1,)), None)]
    _step(job(tmp_path, model), accelerator, model, optimizer, window, 0)
    assert [boxes for _, _, boxes in model.seen] == [0.5, 0.5]  # the window's mean of one


def test_bounds_are_kept_after_every_step(tmp_path, accelerator):
    model = Plane()
    given = job(tmp_path, model, max_train_steps=3)
    train(replace(given, after_step=lambda: model.w.data.clamp_(-0.05, 0.15)), accelerator)
    assert model.w.tolist() == pytest.approx([-0.05, 0.15])  # free it would be at -0.3, 0.3


def test_going_on_from_an_earlier_checkpoint_drops_the_later_ones(tmp_path, accelerator):
    train(job(tmp_path, max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=9), accelerator)
    again = job(tmp_path, max_train_steps=3, checkpointing_steps=9, resume_from_checkpoint="checkpoint-2")
    train(replace(again, train=again.train.model_copy(update={"checkpoints_total_limit": 9})), accelerator)
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_batch_size": 3}, "examples_a_step = 2, this run has 3"),
        ({"gradient_accumulation_steps": 2}, "examples_a_step = 2, this run has 4"),
        ({"seed": 5}, "seed = 0, this run has 5"),
    ],
)
def test_going_on_with_other_examples_is_refused(tmp_path, accelerator, change, says):
    train(job(tmp_path, max_train_steps=1), accelerator)
    seed = {"seed": change["seed"]} if "seed" in change else {}
    sizes = {} if seed else change
    other = replace(job(tmp_path, resume_from_checkpoint="latest", **sizes), **seed)
    with pytest.raises(InputError, match=says):
        train(other, accelerator)
    train(
        job(tmp_path, resume_from_checkpoint="latest", train_batch_size=1, gradient_accumulation_steps=2), accelerator
    )


def test_a_run_by_hand(tmp_path, accelerator):
    """Constant gradients let AdamW move by the rate, so w tells the sum of all rates."""
    figures = iter({"itm_text": value} for value in (0.1, 0.2, 0.3))
    model = Plane()
    given = replace(
        job(tmp_path, model, lr_scheduler="cosine", checkpointing_steps=3, validation_steps=3, min_timestep=7),
        validate=lambda: next(figures),
    )
    assert train(given, accelerator) == {"itm_text": 0.3}
    rates = [0.1 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]  # sum: 0.25
    assert model.w.tolist() == pytest.approx([-0.25, 0.25], abs=1e-5)
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 4], "every third step and the last"
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["split"]) for row in rows] == [(0, "val"), (3, "val"), (4, "train"), (4, "val")]
    assert [row["itm_text"] for row in rows if row["split"] == "val"] == [0.1, 0.2, 0.3]
    last = rows[2]
    assert last["lr"] == pytest.approx(rates[3], rel=1e-4)
    assert last["grad_norm"] == pytest.approx(5)
    assert last["loss"] == pytest.approx(3 * -sum(rates[:3]) - 4 * sum(rates[:3]), rel=1e-4)
    records = [record for batch, _, _ in model.seen for record in batch.records]
    assert len(records) == len(set(records)) == 8, "4 steps of 2, no record twice in an epoch of 10"
    assert min(int(draw.timesteps.min()) for _, draw, _ in model.seen) >= 7


@pytest.mark.parametrize("cut", [(2, 2), (1, 4)])
def test_batch_and_accumulation_show_the_same(tmp_path, accelerator, cut):
    def shown(batch: int, parts: int) -> tuple[list[int], Tensor]:
        model = Plane()
        sizes = {"train_batch_size": batch, "gradient_accumulation_steps": parts, "max_train_steps": 2}
        train(job(tmp_path, model, **sizes), accelerator)
        records = [record for coded, _, _ in model.seen for record in coded.records]
        return records, torch.cat([draw.noise for _, draw, _ in model.seen])

    want, got = shown(4, 1), shown(*cut)
    assert got[0] == want[0] and torch.equal(got[1], want[1])


def test_a_stopped_run_goes_on_where_it_was(tmp_path, accelerator):
    def run(folder: Path, model: Plane, load: Callable[[Path], None] = lambda _: None, **settings: Any) -> Plane:
        def save(folder: Path) -> None:
            torch.save(model.w.detach(), folder / "w.pt")

        given = job(folder, model, adam_weight_decay=0.1, checkpointing_steps=1, **settings)
        train(replace(given, save_artifacts=save, load_artifacts=load), accelerator)
        return model

    straight = run(tmp_path / "straight", Plane())
    run(tmp_path / "broken", Plane(), max_train_steps=2)
    model = Plane()

    def load(folder: Path) -> None:
        assert folder.name == "checkpoint-2"
        model.w.data.copy_(torch.load(folder / "w.pt"))

    run(tmp_path / "broken", model, load, resume_from_checkpoint="latest")
    assert torch.equal(model.w, straight.w)
    assert [batch.records for batch, _, _ in model.seen] == [batch.records for batch, _, _ in straight.seen[2:]]
    for (_, mine, _), (_, theirs, _) in zip(model.seen, straight.seen[2:], strict=True):
        assert torch.equal(mine.noise, theirs.noise) and torch.equal(mine.timesteps, theirs.timesteps)
    assert [step for step, _ in checkpoints(tmp_path / "broken")] == [3, 4]


def test_a_refresh_sees_the_step_and_its_batch_is_used(tmp_path, accelerator):
    steps: list[int] = []

    def refresh(step: int, batch: Batch) -> Batch:
        steps.append(step)
        return replace(batch, records=(100 + step,) * len(batch))

    model = Plane()
    given = job(tmp_path, model, max_train_steps=2, gradient_accumulation_steps=2)
    train(replace(given, refresh=refresh), accelerator)
    assert steps == [0, 0, 1, 1]
    assert [batch.records for batch, _, _ in model.seen] == [(100, 100)] * 2 + [(101, 101)] * 2


def test_a_gradient_that_is_not_finite_is_no_step(tmp_path, accelerator):
    model = Plane()
    model.w.register_hook(lambda gradient: gradient * math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    window: Any = [(Coded((4,), slope=(1.0, 1.0)), None)]
    with pytest.raises(InputError, match=r"the gradient is not finite at step 8, records \[\[4\]\]"):
        _step(job(tmp_path, model), accelerator, model, optimizer, window, 7)
    assert model.w.tolist() == [0, 0]


def test_a_loss_that_is_not_finite_is_no_step(tmp_path, accelerator):
    with pytest.raises(InputError, match=r"not finite at step 1, records \[\[0\], \[1\]\]: \{'loss_mse': nan\}"):
        step_once(tmp_path, accelerator, 1.0, (1.0, 1.0), (math.nan, 1.0))
