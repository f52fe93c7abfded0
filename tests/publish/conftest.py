"""A small evaluation by hand: two arms with images, one without, as the files of `arms/` and the dict of the JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PROMPTS = {4: ("a red circle and a <b>star</b>", "two_objects"), 9: ("three squares", "counting")}
BROKEN = {"prompt_index": 9, "prompt": PROMPTS[9][0], "category": "counting", "seeds": [1]}


def verdict(index: int, seed: int, correct: bool, score: float | None) -> dict[str, Any]:
    text, category = PROMPTS[index]
    return {
        "file": f"images/{index:05d}_{seed}.png",
        "prompt_index": index,
        "prompt": text,
        "category": category,
        "seed": seed,
        "candidate_seed": seed,
        "score": score,
        "correct": correct,
        "facts": [{"text": "there is a red circle", "holds": correct}, {"text": "there is a star", "holds": True}],
        "extra_objects": 0 if correct else 2,
        "seen": [],
    }


@pytest.fixture(scope="module")
def arms_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("evaluation")
    right = {"base": {(4, 0), (9, 0), (9, 1)}, "dpt": {(4, 0), (9, 0), (4, 1)}}
    for arm, cells in right.items():
        (tmp_path / "arms" / arm / "images").mkdir(parents=True)
        rows = [verdict(i, s, (i, s) in cells, 0.25 if arm == "dpt" else None) for i in PROMPTS for s in (0, 1)]
        for row in rows:
            Image.new("RGB", (64, 64), (row["prompt_index"], row["seed"], len(arm))).save(
                tmp_path / "arms" / arm / row["file"]
            )
        write(tmp_path / "arms" / arm / "verdicts.jsonl", rows)
    phrases = [
        {"phrase": "red circle", "span": [2, 12], "box": [8, 16, 24, 32], "confidence": 0.9, "score": 0.1},
        {"phrase": "star", "span": [22, 26], "box": [40, 40, 60, 60], "confidence": 0.4, "score": 0.1},
    ]
    write(tmp_path / "arms" / "dpt" / "boxes.jsonl", [{"file": "images/00004_0.png", "phrases": phrases}])
    return tmp_path / "arms"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def alignment() -> dict[str, Any]:
    def numbers(two: float, counting: float, extra: float) -> dict[str, float]:
        return {"overall": (two + counting) / 2, "two_objects": two, "counting": counting, "extra_objects": extra}

    arms = {"base": numbers(0.5, 1.0, 0.25), "dpt": numbers(1.0, 0.5, 0.125), "random": numbers(0.3333, 0.5, 0.125)}
    around = {
        arm: {key: {"low": max(0, value - 0.1), "high": min(1, value + 0.07)} for key, value in n.items()}
        for arm, n in arms.items()
    }
    return {
        "prompts": 2,
        "seeds": [0, 1],
        "suite": "dev",
        "categories": {"two_objects": 1, "counting": 1},
        "arms": arms,
        "intervals": around,
        "differences": {
            "dpt-base": {
                "mean": 0.123,
                "low": 0.05,
                "high": 0.2,
                "categories": {
                    "two_objects": {"mean": 0.5, "low": 0.25, "high": 0.75},
                    "counting": {"mean": -0.5, "low": -1.0, "high": 0.0},
                },
                "extra_objects": {"mean": -0.125, "low": -0.2, "high": 0.1},
            },
            "dpt-random": {"mean": -0.01, "low": -0.04, "high": 0.02},
        },
        "fixed": {"dpt-base": [{**BROKEN, "prompt_index": 4, "prompt": PROMPTS[4][0], "category": "two_objects"}]},
        "broken": {"dpt-base": [BROKEN]},
        "settings": {"seeds": "0-1", "note": "<&>"},
        "command": "dpt evaluate alignment --suite dev",
        "versions": {"torch": "2.0"},
    }
