"""Arms from end to end, with a stand-in for the model that draws right and wrong scenes by a rule known here."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpt_t2i.config import AlignmentConfig, CorrectionConfig, GenerateConfig, ModelConfig, SampleConfig
from dpt_t2i.evaluation import alignment
from dpt_t2i.evaluation.alignment import run_arms, summarise
from dpt_t2i.evaluation.arm_images import jobs_of_arm
from dpt_t2i.evaluation.suites import open_suite
from dpt_t2i.evaluation.verdicts import Outcome, chosen
from dpt_t2i.sampling.generate import Generated, Job, jobs_of
from dpt_t2i.sampling.model import T2IModel
from dpt_t2i.scenes.checker import check
from dpt_t2i.scenes.facts import Fact
from dpt_t2i.scenes.layout import draw_scene
from dpt_t2i.scenes.render import render

STRIDE = 1_000_000


@cache
def draw(facts: tuple[Fact, ...]) -> Image.Image:
    """A picture of which the claims are true, by the checker's own word."""
    phrases = [fact.phrase for fact in facts if fact.kind != "relation" for _ in range(fact.count)]
    small = [replace(p, size=p.size or "small") for p in phrases]
    relation = next((fact.relation for fact in facts if fact.kind == "relation"), None)
    for seed in range(20):
        scene = draw_scene(small, np.random.default_rng(seed), relation)
        if scene is not None and check(picture := render(scene, 64), facts).correct:
            return picture
    raise AssertionError(facts)


class Draughtsman:
    """Makes images in place of a model: right ones where `is_right` says so, else an empty grey square.

    The score of candidate k of prompt p is highest at k = p % 4.
    """

    scorer = None

    def __init__(self, lora: Path | None, adapter: Path | None) -> None:
        self.tuned, self.adapter, self.made = lora is not None, adapter, 0

    def is_right(self, job: Job, corrected: bool) -> bool:
        candidate, seed = divmod(job.seed, STRIDE)
        if self.tuned:
            return corrected or candidate == job.prompt_index % 4 or (candidate == 0 and seed == 1)
        return job.prompt_index % 3 == 0

    def run(self, jobs: Sequence[Job], config: GenerateConfig, on_step: object = None) -> Iterator[Generated]:
        prompts = {p.index: p.prompt for p in open_suite("dev")}
        for job in jobs:
            self.made += 1
            right = self.is_right(job, config.correction.correct > 0)
            image = draw(prompts[job.prompt_index].facts) if right else Image.new("RGB", (64, 64), (120, 120, 120))
            score = -abs(job.seed // STRIDE - job.prompt_index % 4) if self.adapter else None
            yield Generated(job, image, torch.zeros(1), score)

    def settings(self, config: GenerateConfig) -> dict[str, Any]:
        return {"tuned": self.tuned, "correction": config.correction.correct}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("dpt/tuned/adapter", "dpt/probe/adapter"):
        (tmp_path / "base" / folder).mkdir(parents=True)
    (tmp_path / "base/model_index.json").write_text("{}")
    (tmp_path / "base/dpt/tuned/pytorch_lora_weights.safetensors").touch()
    monkeypatch.setattr(alignment, "_boxes", lambda model, folder, rows, config: [{"file": r["file"]} for r in rows])
    return tmp_path / "base"


def config(base: Path, *arms: str, **settings: Any) -> AlignmentConfig:
    return AlignmentConfig(
        model=ModelConfig(pretrained_model_name_or_path=str(base)),
        arms=arms,
        correction=CorrectionConfig(correct=1.0),
        output_dir=base.parent / "out" / "dev",
        bootstrap_draws=200,
        **{"max_prompts": 12, "seeds": "0-1", **settings},
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_arms_by_the_rule(base: Path) -> None:
    opened: list[Draughtsman] = []

    def open_model(lora: Path | None, adapter: Path | None) -> Draughtsman:
        opened.append(Draughtsman(lora, adapter))
        return opened[-1]

    settings = config(base, "base", "dpt", "dpt_correct", "dpt_best4", "random")
    result = run_arms(settings, open_model)  # type: ignore[arg-type]
    indices = [p.index for p in open_suite("dev", 12)]  # two of each category, 50 apart
    assert result["prompts"] == 12 and result["seeds"] == [0, 1] and result["suite"] == "dev"

    def expected(right: Any) -> float:
        return float(np.mean([right(i, s) for i in indices for s in (0, 1)]))

    overall = {name: numbers["overall"] for name, numbers in result["arms"].items()}
    assert overall["base"] == pytest.approx(expected(lambda i, s: i % 3 == 0))
    assert overall["dpt"] == pytest.approx(expected(lambda i, s: i % 4 == 0 or s == 1))
    assert overall["dpt_correct"] == 1.0
    assert overall["dpt_best4"] == 1.0  # the score points at the right candidate
    assert overall["random"] == pytest.approx(expected(lambda i, s: (1 + (s == 1 and i % 4 != 0)) / 4))
    assert result["arms"]["dpt_best4"]["extra_objects"] == 0.0
    assert result["differences"]["dpt_best4-random"]["mean"] == pytest.approx(1 - overall["random"])
    assert set(result["differences"]) == {
        "dpt-base", "dpt_correct-dpt", "dpt_correct-base", "dpt_best4-dpt", "dpt_best4-random", "dpt_best4-base"
    }  # fmt: skip
    broken = {row["prompt_index"]: row["seeds"] for row in result["broken"]["dpt-base"]}
    assert broken == {i: [0] for i in indices if i % 3 == 0 and i % 4 != 0}
    fixed = {row["prompt_index"]: row["seeds"] for row in result["fixed"]["dpt-base"]}
    assert fixed == {i: [0, 1] if i % 4 == 0 else [1] for i in indices if i % 3 != 0}
    assert "dpt_best4-random" not in result["fixed"]
    assert json.loads((settings.output_dir / "alignment.json").read_text()) == json.loads(json.dumps(result))
    # Equal weights, one model; the first candidates of the search are the images of `dpt`, not made again.
    assert [(d.tuned, d.adapter is not None) for d in opened] == [(False, False), (True, True)]
    assert opened[1].made == 24 + 24 + 3 * 24


def test_the_files_of_an_arm(base: Path) -> None:
    settings = config(base, "base", "dpt_best4", max_prompts=6, seeds="0")
    run_arms(settings, Draughtsman)  # type: ignore[arg-type]
    arms = settings.output_dir / "arms"
    verdicts, candidates = (read(arms / "dpt_best4" / f"{n}.jsonl") for n in ("verdicts", "candidates"))
    assert len(verdicts) == 6 and len(candidates) == 24
    for row in verdicts:
        assert row["seed"] == 0 and row["candidate_seed"] == (row["prompt_index"] % 4) * STRIDE
        assert row["correct"] and all(fact["holds"] for fact in row["facts"]) and row["seen"]
        assert (arms / "dpt_best4" / row["file"]).is_file()
    assert not (arms / "base" / "candidates.jsonl").exists() and not (arms / "base" / "boxes.jsonl").exists()
    assert [row["file"] for row in read(arms / "dpt_best4" / "boxes.jsonl")] == [row["file"] for row in verdicts]


def test_a_second_run_makes_nothing_and_says_the_same(base: Path) -> None:
    made = []

    def open_model(lora: Path | None, adapter: Path | None) -> Draughtsman:
        made.append(Draughtsman(lora, adapter))
        return made[-1]

    settings = config(base, "base", "dpt", max_prompts=6)
    first = run_arms(settings, open_model)  # type: ignore[arg-type]
    (settings.output_dir / "arms" / "dpt" / "images" / "00000_1.png").unlink()
    second = run_arms(settings, open_model)  # type: ignore[arg-type]
    assert [model.made for model in made] == [12, 12, 0, 1]
    assert first == second


def test_only_test_suites_are_logged(base: Path) -> None:
    log = base.parent / "out" / "test_runs.jsonl"
    run_arms(config(base, "base", max_prompts=6), Draughtsman)  # type: ignore[arg-type]
    assert not log.exists()
    held_out = config(base, "base", max_prompts=4, suite="test_heldout", seeds="0")
    held_out = held_out.model_copy(update={"output_dir": base.parent / "out" / "heldout"})
    for _ in range(2):
        run_arms(held_out, Empty)  # type: ignore[arg-type]
    lines = read(log)
    assert len(lines) == 2 and lines[0]["suite"] == "test_heldout" and lines[0]["overall"] == {"base": 0.0}


def test_the_log_of_test_runs_may_lie_elsewhere(base: Path, tmp_path: Path) -> None:
    log = tmp_path / "kept.jsonl"
    run_arms(config(base, "base", max_prompts=4, suite="test_seen", seeds="0", test_log=log), Empty)  # type: ignore[arg-type]
    assert [line["suite"] for line in read(log)] == ["test_seen"]


class Empty(Draughtsman):
    def is_right(self, job: Job, corrected: bool) -> bool:
        return False


def test_the_summary_by_hand() -> None:
    prompts = open_suite("dev", 6)[:3]
    categories = [p.prompt.category for p in prompts]
    assert len(set(categories)) == 3
    base = Outcome(np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    tuned = Outcome(np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), np.zeros((3, 2)))
    result = summarise(prompts, [3, 8], {"base": base, "dpt": tuned}, draws=50)
    shares = {categories[0]: 0.5, categories[1]: 0.0, categories[2]: 1.0}
    assert result["arms"]["base"] == {"overall": 0.5, **shares, "extra_objects": pytest.approx(1 / 3)}
    assert result["differences"]["dpt-base"]["mean"] == pytest.approx(1 / 6)
    parts = result["differences"]["dpt-base"]["categories"]
    assert [parts[name]["mean"] for name in categories] == [0.5, 0.5, -0.5]
    # A category of one prompt, resampled, is always that prompt.
    assert all(parts[name]["low"] == parts[name]["high"] == parts[name]["mean"] for name in categories)
    assert result["differences"]["dpt-base"]["extra_objects"]["mean"] == pytest.approx(-1 / 3)
    assert result["intervals"]["base"]["overall"]["low"] <= 0.5 <= result["intervals"]["base"]["overall"]["high"]
    assert [(r["prompt"], r["seeds"]) for r in result["fixed"]["dpt-base"]] == [
        (prompts[0].prompt.text, [8]),
        (prompts[1].prompt.text, [8]),
    ]
    assert [(r["prompt_index"], r["seeds"]) for r in result["broken"]["dpt-base"]] == [(prompts[2].index, [8])]
    assert result["categories"] == dict.fromkeys(categories, 1)


def test_candidate_zero_has_the_seed_itself() -> None:
    prompts = open_suite("dev", 2)
    plain, search = (jobs_of_arm(prompts, [0, 5], best_of) for best_of in (1, 4))
    assert [job for job in search if job.seed < STRIDE] == plain
    assert len({job.noise_seed for job in search}) == 16, "no noise is shared, between prompts neither"
    shared = jobs_of_arm(prompts, [0, 5], 1, own_noise=False)
    assert [job.noise_seed for job in shared] == [0, 5, 0, 5]
    assert [job.noise_seed for job in plain] == [
        job.noise_seed for job in jobs_of([p.prompt.text for p in prompts], [0, 5], own_noise=True)
    ]


def test_the_best_score_is_chosen_and_the_lowest_seed_of_equals() -> None:
    rows = [{"seed": seed, "score": score} for seed, score in [(0, 0.1), (STRIDE, 0.7), (2 * STRIDE, 0.7)]]
    assert chosen(rows)["seed"] == STRIDE
    assert chosen([{"seed": 4, "score": None}])["seed"] == 4


def test_with_a_real_model(base: Path, model: T2IModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # boxes for real
    settings = config(base, "base", "dpt_correct", max_prompts=6, seeds="0").model_copy(
        update={"sample": SampleConfig(steps=2, guidance_scale=2.0)}
    )
    result = run_arms(settings, lambda lora, adapter: model if adapter else T2IModel(model.backbone))
    assert 0 <= result["arms"]["dpt_correct"]["overall"] <= 1
    assert set(result["settings"]["arm_settings"]) == {"base", "dpt_correct"}
    boxes = read(settings.output_dir / "arms" / "dpt_correct" / "boxes.jsonl")
    assert len(boxes) == 6 and all(row["phrases"] for row in boxes)
    rows = read(settings.output_dir / "arms" / "dpt_correct" / "manifest.jsonl")
    assert all(row["score"] is not None for row in rows)
