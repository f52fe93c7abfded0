"""Folders beside folders, with judges made by hand and with the bundled one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dpt_t2i.backbones.pair_scorer import PairScorer
from dpt_t2i.cli import main
from dpt_t2i.config import ImageScoresConfig
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation import image_scores
from dpt_t2i.evaluation.image_grid import open_grid, short_names
from dpt_t2i.evaluation.image_scores import run_image_scores, summarise
from dpt_t2i.scenes.example import make_example
from dpt_t2i.scenes.render import render
from tests.e2e.launching import error_lines, launch

PROMPTS = ("a red circle", "a blue star", "two stars")
SEEDS = (3, 4)


def write_folder(folder, shade, prompts=PROMPTS, seeds=SEEDS):
    """A generation folder whose image of prompt p, seed s is grey of shade(p, s)."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for p, prompt in enumerate(prompts):
        for seed in seeds:
            file = f"images/{p:05d}_{seed}.png"
            Image.new("L", (4, 4), shade(p, seed)).save(folder / file)
            rows.append({"file": file, "prompt_index": p, "prompt": prompt, "seed": seed, "arm": "base", "score": None})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return folder


def grey_judge(name="grey"):
    """Two measures: how bright the picture is, in hundredths, and how many words the prompt has, in tenths."""

    def score(pictures, texts):
        assert all(len(pictures) == len(one) <= 4 for one in texts)
        bright = torch.tensor([picture.convert("L").getpixel((0, 0)) / 100 for picture in pictures])
        return [{"light": bright, "words": torch.tensor([len(t.split()) / 10 for t in one])} for one in texts]

    return PairScorer(name, ("light", "words"), {"image_encoder": "0"}, score, lambda texts: [])


@pytest.fixture
def folders(tmp_path):
    base = write_folder(tmp_path / "a" / "base", lambda p, s: 10 * p + s)
    tuned = write_folder(tmp_path / "a" / "tuned", lambda p, s: 10 * p + s + (6 if p else -2))
    return base, tuned


def run(monkeypatch, folders, tmp_path, **settings):
    monkeypatch.setattr(image_scores, "load_pair_scorer", lambda name, device: grey_judge(name))
    config = {"folders": folders, "scorers": ("x/grey",), "device": "cpu", "encode_batch_size": 4}
    return run_image_scores(ImageScoresConfig(output_dir=tmp_path / "out", **config | settings))


def test_means_and_paired_differences_by_hand(monkeypatch, folders, tmp_path):
    result = run(monkeypatch, folders, tmp_path)
    assert (result["prompts"], result["seeds"], result["categories"]) == (3, [3, 4], {"all": 3})
    light = result["measures"]["grey:light"]
    assert light["base"]["mean"] == pytest.approx((3 + 4 + 13 + 14 + 23 + 24) / 600)
    assert light["tuned"]["mean"] == pytest.approx(light["base"]["mean"] + (-2 + 6 + 6) / 300)
    (name,) = result["differences"]["grey:light"]
    difference = result["differences"]["grey:light"][name]
    assert name == "tuned-base" and difference["mean"] == pytest.approx(10 / 300)
    assert difference["wins"] == pytest.approx(4 / 6)
    # of three prompts all resamples are known: from three times -0.02 to three times 0.06
    assert difference["low"] == pytest.approx(-0.02) and difference["high"] == pytest.approx(0.06)
    assert result["differences"]["grey:words"]["tuned-base"] == {"mean": 0, "low": 0, "high": 0, "wins": 0.5}
    stored = json.loads((tmp_path / "out/image_scores.json").read_text())
    assert stored["measures"] == result["measures"] and stored["folders"]["base"] == str(folders[0])
    rows = [json.loads(line) for line in (tmp_path / "out/image_scores.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert rows[1] == {
        "folder": "base",
        "file": "images/00000_4.png",
        "prompt": "a red circle",
        "category": "all",
        "seed": 4,
        "scores": {"grey:light": pytest.approx(0.04), "grey:words": pytest.approx(0.3)},
    }
    assert any("grey:light  tuned-base: +0.0333" in line and "67 % of the images" in line for line in result["summary"])


def test_a_category_weighs_as_much_as_another(monkeypatch, folders, tmp_path):
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\na red circle\tcolour\na blue star\tcolour\ntwo stars\tcount\n")
    result = run(monkeypatch, folders, tmp_path, prompts_file=tmp_path / "p.tsv")
    assert result["categories"] == {"colour": 2, "count": 1}
    base = result["measures"]["grey:light"]["base"]
    assert base["categories"] == pytest.approx({"colour": 0.085, "count": 0.235})
    assert base["mean"] == pytest.approx(0.16)
    assert result["differences"]["grey:light"]["tuned-base"]["mean"] == pytest.approx((0.02 + 0.06) / 2)


def test_a_judge_that_prefers_no_prompt_is_named(monkeypatch, folders, tmp_path):
    result = run(monkeypatch, folders, tmp_path)
    # `words`, each prompt beside the next: three words and three, three and two, two and three; equal ones count half.
    assert result["measures"]["grey:words"]["base"]["told_apart"]["mean"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert result["measures"]["grey:light"]["base"]["told_apart"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert [line.split(" prefers")[0] for line in result["warnings"]] == ["warning: grey:light", "warning: grey:words"]
    assert set(result["warnings"]) <= set(result["summary"])


def test_a_blind_judge_passes_by_no_luck_of_few_prompts():
    """Right on every prompt: 4 of 4 could be chance in 1 of 16 cases, and in more of the best of three folders."""

    def warned(prompts, folders, share=1.0):
        told = {str(f): {"told_apart": {"mean": share}} for f in range(folders)}
        return bool(image_scores._blind({"m": told}, prompts))

    assert [warned(n, 1) for n in (2, 3, 4)] == [True, True, False]
    assert [warned(n, 3) for n in (4, 5, 6)] == [True, True, False]
    assert not warned(100, 1, 0.6) and warned(100, 1, 0.59), "Wilson's lower end of 60 of 100 is 0.502"


def test_pairs_of_hyphened_folders_keep_apart(monkeypatch, tmp_path):
    folders = [write_folder(tmp_path / name, lambda p, s: p + s) for name in ("c", "b-c", "a-b", "a")]
    result = run(monkeypatch, folders, tmp_path)
    assert list(result["differences"]["grey:light"]) == [
        "b-c - c", "a-b - c", "a - c", "a-b - b-c", "a - b-c", "a - a-b"
    ]  # fmt: skip
    with pytest.raises(InputError, match="cannot be told apart by name; rename"):
        image_scores._pairs(["c", "b-c", "a-b", "a", "f", "e - f", "d - e", "d"])


def test_one_prompt_alone_has_no_control(monkeypatch, tmp_path):
    only = write_folder(tmp_path / "only", lambda p, s: s, prompts=PROMPTS[:1])
    result = run(monkeypatch, (only,), tmp_path)
    assert result["measures"]["grey:light"]["only"]["told_apart"] is None
    assert result["warnings"] == ["warning: one prompt tells no spread, so intervals are too narrow: all"]
    assert result["differences"] == {"grey:light": {}, "grey:words": {}}


def test_the_bundled_judge_prefers_true_pictures(tmp_path):
    examples = [make_example(n, seed=11, split="val") for n in range(24)]
    prompts = [e.caption.text for e in examples]
    true = write_folder(tmp_path / "true", lambda p, s: 0, prompts, (0,))
    shifted = write_folder(tmp_path / "shifted", lambda p, s: 0, prompts, (0,))
    for n, example in enumerate(examples):
        render(example.scene, 64).save(true / f"images/{n:05d}_0.png")
        render(example.scene, 64).save(shifted / f"images/{(n + 5) % 24:05d}_0.png")
    result = run_image_scores(ImageScoresConfig(folders=(shifted, true), device="cpu", output_dir=tmp_path / "out"))
    difference = result["differences"]["bundled:cosine"]["true-shifted"]
    assert difference["low"] > 0 and difference["wins"] > 0.9
    told = {name: numbers["told_apart"] for name, numbers in result["measures"]["bundled:cosine"].items()}
    assert told["true"]["mean"] > 0.9 > 0.75 > told["shifted"]["mean"] and told["true"]["low"] > 0.5
    assert result["warnings"] == []  # one folder shows that the judge knows such pictures
    assert result["scorers"]["bundled"].keys() == {"text_encoder", "image_encoder"}


def test_nan_names_the_image(monkeypatch, folders, tmp_path):
    for values in ((float("nan"), 0.0), (0.0, float("nan"))):  # of the own prompt, and of the other

        def score(pictures, texts, values=values):
            return [{"s": torch.full((len(one),), value)} for one, value in zip(texts, values, strict=True)]

        broken = PairScorer("x", ("s",), {}, score, lambda texts: [])
        monkeypatch.setattr(image_scores, "load_pair_scorer", lambda name, device, broken=broken: broken)
        with pytest.raises(InputError, match=r"scorer `x`: s of .*base/images/00000_3.png is NaN"):
            run_image_scores(ImageScoresConfig(folders=folders, device="cpu", output_dir=tmp_path / "out"))


def test_folders_that_do_not_pair_are_one_line(folders, tmp_path):
    fewer = write_folder(tmp_path / "fewer", lambda p, s: 0, seeds=(3,))
    with pytest.raises(InputError, match=r"fewer and .*base are not .*: `a blue star` with seed 4 .* only \(3 such\)"):
        open_grid((folders[0], fewer))
    with pytest.raises(InputError, match="nothing to score"):
        open_grid(())
    with pytest.raises(InputError, match="given twice"):
        open_grid((folders[0], folders[0]))
    with pytest.raises(InputError, match="is no generation folder"):
        open_grid((tmp_path,))
    (tmp_path / "p.txt").write_text("a red circle\n")
    with pytest.raises(InputError, match=r"does not have `a blue star` \(2 such\)"):
        open_grid(folders, tmp_path / "p.txt")
    lines = (folders[1] / "manifest.jsonl").read_text().splitlines()
    (folders[1] / "manifest.jsonl").write_text("\n".join(lines[1:]))
    (folders[0] / "manifest.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match="not every prompt has every seed"):
        open_grid(folders)


def test_of_an_arm_that_searched_its_pick_counts(tmp_path):
    """The manifest of such an arm has every candidate; the mean over them is that of a blind pick."""
    plain = write_folder(tmp_path / "dpt", lambda p, s: 10 * p + s)
    searched = write_folder(tmp_path / "dpt_best4", lambda p, s: 10 * p + s, seeds=(3, 4, 1003, 1004))
    picks = [(p, seed, seed + 1000 * (p == 1)) for p in range(3) for seed in SEEDS]
    for name, rows in (("verdicts", picks), ("candidates", [])):
        lines = [
            json.dumps({"file": f"images/{p:05d}_{found}.png", "prompt": PROMPTS[p], "seed": seed, "correct": True})
            for p, seed, found in rows
        ]
        (searched / f"{name}.jsonl").write_text("\n".join(lines))
    grid = open_grid([plain, searched])
    assert grid.seeds == SEEDS and grid.shape == (2, 3, 2)
    assert grid.files[1, 1, 0] == searched / "images/00001_1003.png"
    assert grid.files[1, 2, 1] == searched / "images/00002_4.png"
    (searched / "verdicts.jsonl").write_text('{"file": 1}')
    with pytest.raises(InputError, match="verdicts.jsonl is broken .* run the evaluation again"):
        open_grid([plain, searched])


def test_an_image_that_cannot_be_read_is_one_line(monkeypatch, folders, tmp_path):
    (folders[1] / "images/00001_3.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot read image .*tuned/images/00001_3.png"):
        run(monkeypatch, folders, tmp_path)


def test_the_control_needs_no_other_prompt_in_summaries(folders):
    grid = open_grid(folders)
    values = np.zeros((2, *grid.shape))
    values[1] = np.nan
    assert summarise(grid, {"m": values}, draws=10)["measures"]["m"]["base"]["told_apart"] is None


def test_names_are_as_short_as_tell_them_apart():
    assert short_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert short_names(["runs/x/images", "runs/y/images"]) == ["x/images", "y/images"]
    assert short_names(["openai/clip"]) == ["clip"]


def test_what_is_counted_otherwise_than_it_looks_is_told(tmp_path):
    twice = write_folder(tmp_path / "twice", lambda p, s: 0, prompts=(*PROMPTS, PROMPTS[0]))
    (tmp_path / "p.tsv").write_text(
        "prompt\ttag\na red circle\tcolour\na blue star\tcolour\ntwo stars\tcount\na blue star\tother\n"
    )
    grid = open_grid((twice,), tmp_path / "p.tsv")
    assert grid.shape == (1, 3, 2) and grid.categories == ("colour", "colour", "count")
    assert grid.files[0, 0, 0].name == "00000_3.png"
    assert grid.warnings == (
        "warning: 1 prompts have two categories, of which the first counts",
        "warning: 2 images have prompt and seed of an earlier one, and are not counted",
        "warning: one prompt tells no spread, so intervals are too narrow: count",
    )
    (tmp_path / "p.tsv").write_text("prompt\ttag\na red circle\tx\na blue star\t\ntwo stars\tx\n")
    assert open_grid((twice,), tmp_path / "p.tsv").categories == ("x", "uncategorised", "x")


def test_prompts_that_a_scorer_cuts_are_told(monkeypatch, folders, tmp_path):
    judge = replace(grey_judge(), cut=lambda texts: [text for text in texts if "star" in text])
    monkeypatch.setattr(image_scores, "load_pair_scorer", lambda name, device: judge)
    config = ImageScoresConfig(folders=folders, device="cpu", encode_batch_size=4, output_dir=tmp_path / "out")
    lines = run_image_scores(config)["warnings"]
    assert lines[0] == "warning: scorer `grey` does not read the end of 2 prompts, such as `a blue star...`"


def test_a_scorer_that_mined_the_negatives_is_told(monkeypatch, folders, tmp_path):
    with pytest.raises(InputError, match="trained_on .*nowhere is no folder"):
        run(monkeypatch, folders, tmp_path, trained_on=(tmp_path / "nowhere",))
    header = {"encoder": "grey", "fingerprint": {"image_encoder": "0", "text_encoder": "1"}}
    monkeypatch.setattr("dpt_t2i.evaluation.miner.read_miner", lambda folder: header)
    (tmp_path / "data").mkdir()
    lines = run(monkeypatch, folders, tmp_path, trained_on=(tmp_path / "data",))["warnings"]
    assert "mined with `grey`, whose image_encoder the scorer `x/grey` uses too" in lines[-1]


def test_the_command_on_two_processes_gives_what_one_gives(tmp_path):
    """The second process meets the broken image, and the run ends with its line."""
    prompts = [make_example(n, seed=11, split="val").caption.text for n in range(5)]
    first = write_folder(tmp_path / "first", lambda p, s: 40 * p, prompts)
    second = write_folder(tmp_path / "second", lambda p, s: 30 * p + s, prompts)
    flags = ["evaluate", "images", "--folders", str(first), "--folders", str(second), "--device", "cpu"]
    flags += ["--encode_batch_size", "4", "--bootstrap_draws", "50", "--output_dir"]
    assert main([*flags, str(tmp_path / "one")]) == 0
    launch(*flags, tmp_path / "two", processes=2)
    one, two = (json.loads((tmp_path / name / "image_scores.json").read_text()) for name in ("one", "two"))
    for measure, folders in one["measures"].items():
        for name, numbers in folders.items():
            assert two["measures"][measure][name]["mean"] == pytest.approx(numbers["mean"], abs=1e-5)
    assert len((tmp_path / "two/image_scores.jsonl").read_text().splitlines()) == 20
    (second / "images/00004_4.png").write_bytes(b"no picture")
    (said,) = error_lines(launch(*flags, tmp_path / "three", processes=2, expect=None))
    assert "cannot read image" in said and "00004_4.png" in said
