"""The loop on a model of two numbers, so that every step can be done on paper."""

import errno
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from dpt_t2i.config import DataConfig, TrainConfig
from dpt_t2i.data.examples import Batch, Examples
from dpt_t2i.data.records import Record
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.errors import InputError, Stopped
from dpt_t2i.training import signals as signals_room
from dpt_t2i.training.checkpoint import checkpoints
from dpt_t2i.training.denoising import Draw
from dpt_t2i.training.engine import _count_on_cpu, _rate_factor, train
from dpt_t2i.training.job import Job
from dpt_t2i.training.occupied import occupied
from dpt_t2i.training.signals import Signals
from dpt_t2i.training.step import take_step
from dpt_t2i.training.trackers import read_metrics
from dpt_t2i.training.windows import Feed, draws, mix
from tests.training import forked

LIKE = torch.zeros(1, 4, 2, 2)
DRAW = Draw(LIKE[:1], torch.tensor([7]), torch.tensor([False]))


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
    examples = Examples(SceneRecords(length=10, size=16), 16)
    return Job(
        objective=objective or Plane(),
        weights={"loss_mse": weight},
        feed=Feed(encoder, examples, TrainConfig(**(defaults | train)), DataConfig(), 0.5, 0),  # type: ignore[arg-type]
        output_dir=folder,
        save_artifacts=lambda folder: None,
        load_artifacts=lambda folder: None,
        validate=dict,
    )


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def fed(given: Job, **changes: Any) -> Job:
    return replace(given, feed=replace(given.feed, **changes))


def whole(parts: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.cat([draw.noise for draw in parts]),
        torch.cat([draw.timesteps for draw in parts]),
        torch.cat([draw.drop_caption for draw in parts]),
    )


def test_draws_do_not_depend_on_how_a_step_is_cut(tmp_path):
    one = draws(job(tmp_path).feed, 5, parts=1, count=4, like=LIKE)
    two = draws(job(tmp_path).feed, 5, parts=2, count=2, like=LIKE)
    assert [len(draw.timesteps) for draw in one + two] == [4, 2, 2]
    assert one[0].noise.shape == (4, 4, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole(one), whole(two), strict=True))
    assert not torch.equal(two[0].noise, two[1].noise)


def test_draws_differ_by_step_and_by_seed(tmp_path):
    first = job(tmp_path).feed
    noises = [draws(feed, step, 1, 4, LIKE)[0].noise for feed in (first, replace(first, seed=1)) for step in (0, 1, 2)]
    assert all(not torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    assert torch.equal(noises[0], draws(first, 0, 1, 4, LIKE)[0].noise)


def test_timesteps_reach_both_ends_and_captions_drop_as_often_as_asked(tmp_path):
    noise, timesteps, drop = whole(draws(job(tmp_path, min_timestep=3, max_timestep=6).feed, 0, 1, 2000, LIKE))
    assert timesteps.unique().tolist() == [3, 4, 5, 6]
    assert abs(drop.float().mean().item() - 0.5) < 0.05  # standard deviation 0.011
    assert abs(noise.std().item() - 1) < 0.02
    assert not draws(fed(job(tmp_path), caption_dropout=0.0).feed, 0, 1, 50, LIKE)[0].drop_caption.any()
    assert draws(fed(job(tmp_path), caption_dropout=1.0).feed, 0, 1, 50, LIKE)[0].drop_caption.all()


def test_every_seed_step_and_rank_has_its_own_number():
    numbers = {mix(seed, step, rank) for seed in range(4) for step in (0, 1, 999_999, 2**31 - 1) for rank in range(8)}
    assert len(numbers) == 4 * 4 * 8
    assert 0 <= min(numbers) and max(numbers) < 2**63


def test_rates(tmp_path):
    def factor(**train: Any) -> list[float]:
        schedule = _rate_factor(job(tmp_path, max_train_steps=8, **train).feed.train)
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
    window: Any = [(Coded((i,), boxes=1 + 2 * i, slope=slope), DRAW) for i, slope in enumerate(slopes)]
    outcome = take_step(given, accelerator, model, optimizer, window, 0)
    return model, outcome


def test_a_long_gradient_is_clipped_and_its_own_norm_told(tmp_path, accelerator):
    model, outcome = step_once(tmp_path, accelerator, 1.0, (3.0, 4.0))
    assert outcome.norm == pytest.approx(5)
    assert model.w.tolist() == pytest.approx([-0.6, -0.8], abs=1e-5)
    assert outcome.terms == {"loss_mse": 0.0, "loss": 0.0}  # taken at w = 0


def test_a_short_gradient_is_left_alone(tmp_path, accelerator):
    model, outcome = step_once(tmp_path, accelerator, 10.0, (3.0, 4.0))
    assert outcome.norm == pytest.approx(5) and model.w.tolist() == [-3, -4]


def test_a_window_is_averaged_weighted_and_shares_its_boxes(tmp_path, accelerator):
    model, outcome = step_once(tmp_path, accelerator, 100.0, (6.0, 0.0), (0.0, 8.0), weight=2.0)
    assert model.w.tolist() == [-6, -8] and outcome.norm == pytest.approx(10)  # 2 x the mean of both slopes
    assert [boxes for _, _, boxes in model.seen] == [2, 2]  # 1 and 3 boxes


def test_a_step_without_boxes_divides_by_one(tmp_path, accelerator):
    model = Plane()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    window: Any = [(Coded((0,)), None), (Coded((1,)), None)]
    take_step(job(tmp_path, model), accelerator, model, optimizer, window, 0)
    assert [boxes for _, _, boxes in model.seen] == [0.5, 0.5]  # the window's mean of one


def test_bounds_are_kept_after_every_step(tmp_path, accelerator):
    model = Plane()
    given = job(tmp_path, model, max_train_steps=3)
    train(replace(given, after_step=lambda: model.w.data.clamp_(-0.05, 0.15)), accelerator)
    assert model.w.tolist() == pytest.approx([-0.05, 0.15])  # free it would be at -0.3, 0.3


def no_room(folder: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_going_on_from_an_earlier_checkpoint_drops_the_later_ones(tmp_path, accelerator, caplog):
    train(job(tmp_path, max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=9), accelerator)
    before = read_metrics(tmp_path / "metrics.jsonl")
    failing = job(tmp_path, Poisoned(1), checkpointing_steps=1, resume_from_checkpoint="checkpoint-2")
    with pytest.raises(InputError, match="step 3: the loss is not finite"):
        train(failing, accelerator)
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2, 3, 4], "nothing goes before there is something new"
    assert "goes back to step 2: checkpoint-3, checkpoint-4 will be removed" in caplog.text
    assert read_metrics(tmp_path / "metrics.before.jsonl") == before
    full = replace(job(tmp_path, checkpointing_steps=1, resume_from_checkpoint="checkpoint-2"), save_artifacts=no_room)
    with pytest.raises(InputError, match="cannot write .*checkpoint-3: .*No space"):
        train(full, accelerator)
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2, 3, 4], "nor before the new one is whole"
    assert read_metrics(tmp_path / "metrics.before.jsonl") == before, "nor does the second going back replace these"
    assert "of before stay in metrics.before-2.jsonl" in caplog.text
    again = job(tmp_path, max_train_steps=3, checkpointing_steps=9, resume_from_checkpoint="checkpoint-2")
    train(fed(again, train=again.feed.train.model_copy(update={"checkpoints_total_limit": 9})), accelerator)
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_batch_size": 3}, "examples_a_step = 2 .*processes.*, this run has 3"),
        ({"gradient_accumulation_steps": 2}, "examples_a_step = 2 .*, this run has 4"),
        ({"seed": 5}, "seed = 0, this run has 5"),
    ],
)
def test_going_on_with_other_examples_is_refused(tmp_path, accelerator, change, says):
    train(job(tmp_path, max_train_steps=1), accelerator)
    seed = {"seed": change["seed"]} if "seed" in change else {}
    sizes = {} if seed else change
    other = fed(job(tmp_path, resume_from_checkpoint="latest", **sizes), **seed)
    with pytest.raises(InputError, match=says):
        train(other, accelerator)
    train(
        job(tmp_path, resume_from_checkpoint="latest", train_batch_size=1, gradient_accumulation_steps=2), accelerator
    )


def test_going_on_with_scenes_of_other_categories_is_refused(tmp_path, accelerator):
    train(job(tmp_path, max_train_steps=1), accelerator)
    again = job(tmp_path, resume_from_checkpoint="latest")
    other = fed(again, data=again.feed.data.model_copy(update={"scene_categories": ("counting",)}))
    with pytest.raises(InputError, match=r"scene_categories = \[\], this run has \['counting'\]"):
        train(other, accelerator)


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


@pytest.mark.parametrize("workers", [0, 2])
def test_each_broken_picture_is_told_once_and_counted(tmp_path, accelerator, caplog, workers):
    for number in range(6):
        Image.new("L", (16, 16), 40 * number).save(tmp_path / f"{number}.png")
    broken = [tmp_path / "1.png", tmp_path / "4.png"]
    for file in broken:
        file.write_bytes(b"x")
    records = [Record(str(n), "toy", tmp_path / f"{n}.png", (f"picture {n}",)) for n in range(6)]
    given = job(tmp_path / "run", max_train_steps=12, train_batch_size=3)  # six epochs
    data = DataConfig(dataloader_num_workers=workers)
    train(fed(given, examples=Examples(records, 16, skip_bad=True), data=data), accelerator)
    said = [line for line in caplog.messages if "left out (" in line]
    assert [line[:22] for line in said] == ["left out (1 so far): c", "left out (2 so far): c"]
    assert all(sum(str(file) in line for line in said) == 1 for file in broken)
    total = "2 broken records or pictures were left out of this run"
    assert caplog.messages.count(total) == 1 and not any("left out of this run" in line for line in said)


def test_a_refresh_sees_the_step_and_its_batch_is_used(tmp_path, accelerator):
    steps: list[int] = []

    def refresh(step: int, batch: Batch) -> Batch:
        steps.append(step)
        return replace(batch, records=(100 + step,) * len(batch))

    model = Plane()
    given = job(tmp_path, model, max_train_steps=2, gradient_accumulation_steps=2)
    train(fed(given, refresh=refresh), accelerator)
    assert steps == [0, 0, 1, 1]
    assert [batch.records for batch, _, _ in model.seen] == [(100, 100)] * 2 + [(101, 101)] * 2


def test_a_gradient_that_is_not_finite_is_no_step(tmp_path, accelerator):
    model = Plane()
    model.w.register_hook(lambda gradient: gradient * math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    window: Any = [(Coded((4,), slope=(1.0, 1.0)), DRAW)]
    outcome = take_step(job(tmp_path, model), accelerator, model, optimizer, window, 7)
    assert model.w.tolist() == [0, 0]
    file = tmp_path / "nan" / "step-8-rank-0.safetensors"
    assert outcome.fault == f"the gradient is not finite (norm inf), records [[4]]; its batch is in {file}"


def test_a_loss_that_is_not_finite_is_no_step_and_its_batch_is_kept(tmp_path, accelerator):
    model, outcome = step_once(tmp_path, accelerator, 1.0, (1.0, 1.0), (math.nan, 1.0))
    assert model.w.tolist() == [0, 0]
    file = tmp_path / "nan" / "step-1-rank-0.safetensors"
    said = "the loss is not finite, records [1]: {'loss_mse': nan, 'loss': nan}"
    assert outcome.fault == f"{said}; its batch is in {file}"
    with safe_open(file, framework="pt") as saved:
        assert saved.metadata() == {"format": "pt", "said": said, "records": "[[0], [1]]"}
        assert set(saved.keys()) == {f"{n}.{name}" for n in (0, 1) for name in ("noise", "timesteps", "drop_caption")}
        assert saved.get_tensor("1.timesteps").tolist() == [7]


def test_a_run_keeps_the_batches_of_its_first_faults_alone(tmp_path, accelerator):
    """A few per cent of the steps of days would fill the disk."""
    train(job(tmp_path, Poisoned(*range(1, 15)), on_nan="skip", max_train_steps=15), accelerator)
    assert len(list((tmp_path / "nan").iterdir())) == 10
    assert train_rows(tmp_path)[-1]["skipped"] == 14


def train_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "train"]


class Poisoned(Plane):
    """Its loss is NaN at the given calls."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, batch: Coded, draw: Draw, num_boxes: float) -> dict[str, Tensor]:
        (term,) = super().forward(batch, draw, num_boxes).values()
        return {"loss_mse": term * math.nan if len(self.seen) in self.calls else term}


def test_a_run_stops_at_nan_and_names_the_step(tmp_path, accelerator):
    with pytest.raises(
        InputError, match=r"^step 3: the loss is not finite, records \[\d, \d\]: .*nan.*checkpoint-2 is intact"
    ):
        train(job(tmp_path, Poisoned(3), checkpointing_steps=1), accelerator)
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2]
    with pytest.raises(InputError, match="step 1: the loss is not finite.*mend the data; .*holds no checkpoint yet"):
        train(job(tmp_path / "new", Poisoned(1)), accelerator)


def test_a_record_that_turns_out_to_be_broken_ends_the_run_with_a_checkpoint(tmp_path, accelerator):
    def record(index):
        image = tmp_path / "broken.png" if index == 5 else (lambda: Image.new("RGB", (16, 16)))
        return Record(str(index), "toy", image, ("a",))

    (tmp_path / "broken.png").write_bytes(b"no picture")
    given = job(tmp_path / "run", max_train_steps=5)
    given = fed(given, examples=Examples([record(index) for index in range(10)], 16))
    with pytest.raises(
        InputError, match=r"^step (\d): .*broken.png.*; checkpoint-\d is kept, and --on_bad skip"
    ) as told:
        train(given, accelerator)
    done = int(str(told.value)[5]) - 1
    assert done > 0 and [step for step, _ in checkpoints(tmp_path / "run")] == [done]


def test_a_run_says_where_it_begins_and_what_it_found(tmp_path, accelerator, caplog):
    given = replace(job(tmp_path, max_train_steps=2), validate=lambda: {"itm_text": 0.25})
    with caplog.at_level("INFO", "dpt_t2i"):
        train(given, accelerator)
        assert "1 process on cpu, 2 examples a step" in caplog.text and "goes on from" not in caplog.text
        assert "step 0, held out: itm_text 0.250" in caplog.text and "step 2, held out: itm_text 0.250" in caplog.text
        train(fed(given, train=given.feed.train.model_copy(update={"resume_from_checkpoint": "latest"})), accelerator)
    assert f"goes on from {tmp_path / 'checkpoint-2'}: all of 2 steps are done already" in caplog.text


def test_a_run_may_skip_nan_and_count_it_across_a_resume(tmp_path, accelerator):
    model = Poisoned(2, 3)
    train(job(tmp_path, model, on_nan="skip"), accelerator)
    assert model.w.tolist() == pytest.approx([-0.2, 0.2], abs=1e-5), "AdamW moved at two of four steps"
    assert train_rows(tmp_path)[-1]["skipped"] == 2
    again = job(tmp_path, Poisoned(1), on_nan="skip", max_train_steps=6, resume_from_checkpoint="latest")
    train(again, accelerator)
    assert train_rows(tmp_path)[-1]["skipped"] == 3


def test_steps_without_a_finite_loss_push_no_checkpoint_out(tmp_path, accelerator):
    """Steps 4 to 8 have none, so that what comes of 3 stays; the last step is kept in any case."""
    bad = Poisoned(4, 5, 6, 7, 8)
    train(job(tmp_path / "a", bad, on_nan="skip", checkpointing_steps=1, max_train_steps=8), accelerator)
    assert [step for step, _ in checkpoints(tmp_path / "a")] == [3, 8]
    bad = Poisoned(4, 5)
    train(job(tmp_path / "b", bad, on_nan="skip", checkpointing_steps=1, max_train_steps=6), accelerator)
    assert [step for step, _ in checkpoints(tmp_path / "b")] == [3, 6]
    how = {"on_nan": "skip", "checkpointing_steps": 3, "checkpoints_total_limit": 9, "max_train_steps": 8}
    train(job(tmp_path / "c", Poisoned(3), **how), accelerator)
    assert [step for step, _ in checkpoints(tmp_path / "c")] == [4, 6, 8], "what was due at 3 comes with 4"


def test_a_run_that_skips_all_its_steps_ends(tmp_path, accelerator):
    with pytest.raises(InputError, match=r"step 20 \(20 in a row\): the loss is not finite"):
        train(job(tmp_path, Poisoned(*range(99)), on_nan="skip", max_train_steps=40, train_batch_size=1), accelerator)


def scaling_accelerator(scale: float) -> Accelerator:
    """fp16's scaler, without fp16, which accelerate has on no CPU."""
    accelerator = Accelerator(cpu=True)
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.unscale_gradients = lambda: [scaler.unscale_(one.optimizer) for one in accelerator._optimizers]
    return accelerator


def test_fp16_lowers_its_scale_until_the_gradient_fits(tmp_path):
    model, taken = Plane(), []
    model.w.register_hook(
        lambda gradient: gradient * 1e4
    )  # 3e4, 4e4: at a scale of 2^120 infinite in float32, at 2^112 not
    given = replace(job(tmp_path, model, max_train_steps=14), after_step=lambda: taken.append(1))
    train(given, scaling_accelerator(2.0**120))
    assert len(taken) == 14 - 8, "some steps were refused, and after those nothing is clamped or averaged"
    assert model.w.abs().min() > 0


def test_fp16_ends_where_the_gradient_is_infinite_at_any_scale(tmp_path):
    model = Plane()
    model.w.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InputError, match=r"^step 20: the gradient was not finite in 20 steps in a row, at any scale"):
        train(job(tmp_path, model, max_train_steps=40, train_batch_size=1), scaling_accelerator(2.0**16))
    assert model.w.tolist() == [0, 0]


def test_what_is_measured_at_the_end_comes_after_the_last_step_and_again_when_nothing_is_left(tmp_path, accelerator):
    model = Plane()
    seen: list[list[float]] = []
    train(replace(job(tmp_path, model), at_end=lambda: seen.append(model.w.tolist())), accelerator)
    assert seen == [model.w.tolist()] and seen != [[0.0, 0.0]]
    again = job(tmp_path, Plane(), resume_from_checkpoint="latest")
    train(replace(again, at_end=lambda: seen.append([])), accelerator)
    assert len(seen) == 2


class Called(Plane):
    """The process gets a signal in the middle of a step."""

    def __init__(self, number: int, call: int) -> None:
        super().__init__()
        self.number, self.call = number, call

    def forward(self, batch: Coded, draw: Draw, num_boxes: float) -> dict[str, Tensor]:
        terms = super().forward(batch, draw, num_boxes)
        if len(self.seen) == self.call:
            os.kill(os.getpid(), self.number)
        return terms


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path, accelerator, number):
    before = signal.getsignal(number)
    validated: list[int] = []
    given = replace(
        job(tmp_path, Called(number, 2), validation_steps=2), validate=lambda: validated.append(1) or {"itm_text": 1.0}
    )
    with pytest.raises(Stopped, match=rf"^{number.name}: stopped at step 2 of 4; go on with --resume") as stopped:
        train(given, accelerator)
    assert stopped.value.signal == number and signal.getsignal(number) == before
    assert [step for step, _ in checkpoints(tmp_path)] == [2]
    assert len(validated) == 1, "the baseline; it does not wait for step 2's validation"
    again = job(tmp_path, Plane(), validation_steps=2, resume_from_checkpoint="latest")
    train(replace(again, validate=given.validate), accelerator)
    rows = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["split"] == "val"]
    assert rows == [0, 2, 4], "which is made up for"


def test_a_second_ctrl_c_acts_at_once_but_not_what_a_launcher_sends_on(monkeypatch):
    clock = iter([0.0, 0.5, 9.0]).__next__  # of the first signal, then of each SIGINT behind it
    monkeypatch.setattr(signals_room.time, "monotonic", clock)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path, accelerator):
    figures = iter([0.9, 0.1, 0.5, 0.7, 0.6, 0.2, 0.1])  # of steps 0, 1, 2, ...: the baseline does not count
    settings = {"max_train_steps": 6, "validation_steps": 1, "checkpointing_steps": 9, "checkpoints_total_limit": 1}
    given = replace(job(tmp_path, **settings), validate=lambda: {"itm_text": next(figures)})
    train(given, accelerator)
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 6]


def test_an_unknown_best_metric_is_named(tmp_path, accelerator):
    given = replace(job(tmp_path, best_metric="itm"), validate=lambda: {"itm_text": 0.1, "rec_p1": 0.2})
    with pytest.raises(InputError, match="best_metric `itm` is no held-out figure .* there are itm_text, rec_p1"):
        train(given, accelerator)


def test_the_checkpoint_comes_before_all_that_may_fail(tmp_path, accelerator):
    """Else a run whose validation fails would lose its steps, and fail at the same place when it goes on."""

    figures = iter([{"itm_text": 0.0}])  # of the start; the next validation fails

    def failing():
        try:
            return next(figures)
        except StopIteration:
            raise InputError("a score is NaN") from None

    given = replace(job(tmp_path, validation_steps=2, checkpointing_steps=2), validate=failing)
    with pytest.raises(InputError, match="a score is NaN"):
        train(given, accelerator)
    assert [step for step, _ in checkpoints(tmp_path)] == [2]


def test_a_best_found_behind_its_checkpoint_lets_the_former_best_go(tmp_path, accelerator):
    figures = iter([0.0, 0.5, 0.1, 0.2, 0.9])
    settings = {"max_train_steps": 4, "validation_steps": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    train(replace(job(tmp_path, **settings), validate=lambda: {"itm_text": next(figures)}), accelerator)
    assert [step for step, _ in checkpoints(tmp_path)] == [4]


@pytest.mark.parametrize("error", [InputError("a score is NaN"), RuntimeError("out of memory"), OSError("no room")])
def test_samples_that_fail_end_no_run(tmp_path, accelerator, caplog, error):
    def failing(step):
        raise error

    train(replace(job(tmp_path), sample=failing, sample_every=2), accelerator)
    assert f"step 2: no samples: {error}" in caplog.text
    assert [step for step, _ in checkpoints(tmp_path)] == [4]


def test_two_runs_in_one_folder_are_refused(tmp_path, accelerator):
    folder = tmp_path / "run"

    def hold():
        with occupied(folder):
            (tmp_path / "held").touch()
            time.sleep(60)

    other = forked.start(hold, tmp_path / "log")
    while not (tmp_path / "held").exists():
        assert other.is_alive()
        time.sleep(0.01)
    with pytest.raises(InputError, match=f"another run is at work in {folder}; .* another --output_dir"):
        train(job(folder), accelerator)
    assert not (folder / "metrics.jsonl").exists(), "nothing of the other's is touched"
    other.kill()  # which lets go of the lock
    other.join()
    train(job(folder), accelerator)
    assert not (folder / ".lock").exists()


def test_adamw_counts_on_the_cpu_wherever_its_state_was_taken():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2, device="meta"))])
    (parameter,) = optimizer.param_groups[0]["params"]
    optimizer.state[parameter] = {"step": SimpleNamespace()}
    _count_on_cpu(optimizer)  # the 8-bit one's is no tensor
    moved = []

    class Counter(Tensor):
        def cpu(self):
            moved.append(1)
            return self

    optimizer.state[parameter] = {"step": torch.tensor(3.0).as_subclass(Counter)}
    _count_on_cpu(optimizer)
    assert moved == [1]


def test_samples_come_when_due(tmp_path, accelerator):
    asked: list[int] = []
    given = replace(job(tmp_path), sample=lambda step: asked.append(step) or {"lora_norm": 0.5}, sample_every=2)
    train(given, accelerator)
    assert asked == [2, 4]
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["split"] == "samples"]
    assert rows == [{"step": step, "split": "samples", "lora_norm": 0.5} for step in asked]


def test_going_back_far_keeps_the_first_new_checkpoint(tmp_path, accelerator):
    """By number it is older than those that it replaces, which are newer than the limit lets stay."""
    train(job(tmp_path, max_train_steps=9, checkpointing_steps=1, checkpoints_total_limit=9), accelerator)
    back = job(tmp_path, max_train_steps=9, checkpointing_steps=1, resume_from_checkpoint="checkpoint-2")

    def stop_after_one(step=[0]):  # noqa: B006
        step[0] += 1
        if step[0] == 2:
            raise InputError("enough")

    with pytest.raises(InputError, match="enough"):
        train(replace(back, after_step=stop_after_one), accelerator)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
