"""The generation folder: complete, resumable image by image, and honest about what made each image."""

import json
import os
from collections.abc import Iterator, Sequence

import pytest
import torch
from accelerate import PartialState
from PIL import Image

from dpt_t2i.errors import InputError, Stopped
from dpt_t2i.sampling.folder import read_manifest, read_parameters, write_generation, write_shared
from dpt_t2i.sampling.generate import Generated, Job, jobs_of

JOBS = jobs_of(["a red circle", "ein “Stern”"], [0, 4])
SETTINGS = {"steps": 3, "size": (8, 8)}  # a tuple: JSON gives it back as a list
FILES = ["images/00000_0.png", "images/00000_4.png", "images/00001_0.png", "images/00001_4.png"]


class Maker:
    """Makes flat images and remembers which jobs it was asked for."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.made: list[Job] = []
        self.fail_after = fail_after

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Generated]:
        for job in jobs:
            if self.fail_after is not None and len(self.made) == self.fail_after:
                raise KeyboardInterrupt
            self.made.append(job)
            color = (job.seed * 10, job.prompt_index * 10, 0)
            yield Generated(job, Image.new("RGB", (8, 8), color), torch.zeros(1), job.seed / 10)


def manifest(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_whole_run(tmp_path):
    maker = Maker()
    rows = write_generation(tmp_path, JOBS, maker, SETTINGS, arm="base")
    assert maker.made == JOBS
    assert sorted(os.listdir(tmp_path)) == ["contact_sheet.png", "images", "manifest.jsonl"]
    assert [f"images/{name}" for name in sorted(os.listdir(tmp_path / "images"))] == FILES
    assert manifest(tmp_path) == json.loads(json.dumps(rows))
    assert [row["file"] for row in rows] == FILES
    assert set(rows[0]) == {"file", "prompt_index", "prompt", "seed", "arm", "score", "settings"}
    last = rows[-1]
    assert (last["prompt_index"], last["prompt"], last["seed"], last["arm"], last["score"]) == (
        1,
        "ein “Stern”",
        4,
        "base",
        0.4,
    )
    assert last["settings"] == {"steps": 3, "size": (8, 8), "noise_seed": 4}
    with Image.open(tmp_path / FILES[3]) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (40, 10, 0)
        stored = json.loads(image.text["parameters"])
    assert stored == read_parameters(tmp_path / FILES[3])
    assert (stored["prompt"], stored["seed"], stored["settings"]["steps"]) == ("ein “Stern”", 4, 3)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_generation(tmp_path, JOBS, Maker(fail_after=2), SETTINGS, arm="base")
    assert [row["file"] for row in manifest(tmp_path)] == FILES[:2]
    maker = Maker()
    resumed = write_generation(tmp_path, JOBS, maker, SETTINGS, arm="base")
    assert maker.made == JOBS[2:]
    whole = write_generation(tmp_path / "whole", JOBS, Maker(), SETTINGS, arm="base")
    assert resumed == whole
    assert manifest(tmp_path) == manifest(tmp_path / "whole")
    for name in (*FILES, "contact_sheet.png"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nothing_is_made_twice(tmp_path):
    write_generation(tmp_path, JOBS, Maker(), SETTINGS, arm="base")
    maker = Maker()
    rows = write_generation(tmp_path, JOBS, maker, SETTINGS, arm="renamed")
    assert maker.made == []
    assert [row["score"] for row in rows] == [0.0, 0.4, 0.0, 0.4]
    assert {row["arm"] for row in rows} == {"renamed"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: Image.new("RGB", (8, 8)).save(path),
    ],
)
def test_a_damaged_or_foreign_image_is_made_again(tmp_path, damage):
    write_generation(tmp_path, JOBS, Maker(), SETTINGS, arm="base")
    before = (tmp_path / FILES[1]).read_bytes()
    damage(tmp_path / FILES[1])
    maker = Maker()
    write_generation(tmp_path, JOBS, maker, SETTINGS, arm="base")
    assert maker.made == [JOBS[1]]
    assert (tmp_path / FILES[1]).read_bytes() == before


def test_other_settings_or_another_prompt_mean_another_image(tmp_path):
    write_generation(tmp_path, JOBS, Maker(), SETTINGS, arm="base")
    maker = Maker()
    write_generation(tmp_path, JOBS, maker, {**SETTINGS, "steps": 4}, arm="base")
    assert maker.made == JOBS
    maker = Maker()
    changed = jobs_of(["a green circle", "ein “Stern”"], [0, 4])
    write_generation(tmp_path, changed, maker, {**SETTINGS, "steps": 4}, arm="base")
    assert maker.made == changed[:2]


def with_manifest(tmp_path, *rows):
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images/a.png").touch()
    whole = {"file": "images/a.png", "prompt_index": 1, "prompt": "a star", "seed": 2}
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(whole | row) + "\n" for row in rows))
    return tmp_path


def test_a_manifest_is_read_by_prompt_and_seed(tmp_path):
    rows = read_manifest(with_manifest(tmp_path, {"seed": "10"}, {"seed": 9}, {"prompt_index": 0, "arm": "base"}))
    assert [(row["prompt_index"], row["seed"]) for row in rows] == [(0, 2), (1, 9), (1, 10)]
    assert rows[0]["arm"] == "base" and rows[0]["prompt"] == "a star"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"seed": None}, "line 2 is broken"),
        ({"seed": float("inf")}, "line 2 is broken"),
        ({"prompt": 5}, "line 2: `prompt` must be a text"),
        ({"file": "/etc/hostname"}, "line 2: .* a path inside the folder"),
        ({"file": 5}, "line 2: .* a path inside the folder"),
        ({"file": "images/b.png"}, "line 2: no image images/b.png"),
    ],
)
def test_a_broken_manifest_is_one_line_that_names_it(tmp_path, row, said):
    with pytest.raises(InputError, match=said):
        read_manifest(with_manifest(tmp_path, {}, row))


def test_an_empty_manifest_and_none_are_one_line(tmp_path):
    with pytest.raises(InputError, match="is no generation folder"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match="lists no image"):
        read_manifest(with_manifest(tmp_path))
    (tmp_path / "manifest.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match="line 1 is broken"):
        read_manifest(tmp_path)


def test_another_schedule_is_another_image_but_older_images_still_count(tmp_path):
    """Images drawn before the schedule was among the settings do not say which it was."""
    settings = {**SETTINGS, "base": {"weights": "0", "config": "1"}}
    write_generation(tmp_path / "new", JOBS, Maker(), settings, arm="base")
    maker = Maker()
    write_generation(tmp_path / "new", JOBS, maker, {**SETTINGS, "base": {"weights": "0", "config": "2"}}, arm="base")
    assert maker.made == JOBS
    write_generation(tmp_path / "old", JOBS, Maker(), {**SETTINGS, "base": {"weights": "0"}}, arm="base")
    for weights, made in (("0", []), ("3", JOBS)):
        maker = Maker()
        again = {**SETTINGS, "base": {"weights": weights, "config": "2"}}
        write_generation(tmp_path / "old", JOBS, maker, again, arm="base")
        assert maker.made == made


def test_a_manifest_with_half_a_character_is_one_line(tmp_path):
    with pytest.raises(InputError, match="is no text"):
        read_manifest(with_manifest(tmp_path, {"prompt": "a \ud83d star"}))


def test_what_other_images_give_way_is_told(tmp_path, caplog):
    write_generation(tmp_path, JOBS, Maker(), SETTINGS, arm="base")
    write_generation(tmp_path, JOBS, Maker(), SETTINGS, arm="base")
    assert not caplog.records
    write_generation(tmp_path, JOBS[:3], Maker(), SETTINGS | {"steps": 4}, arm="base")
    assert f"3 images in {tmp_path} are of other prompts or settings" in caplog.text


def test_images_of_earlier_prompts_are_told(tmp_path, caplog):
    write_generation(tmp_path, JOBS, Maker(), SETTINGS, arm="base")
    assert not caplog.records
    write_generation(tmp_path, JOBS[:3], Maker(), SETTINGS, arm="base")
    assert f"1 more images lie in {tmp_path / 'images'}, of other prompts or seeds than now" in caplog.text


def test_ctrl_c_says_how_to_go_on(tmp_path):
    with pytest.raises(Stopped, match=f"same command draws what is still missing in {tmp_path}") as stopped:
        write_shared(tmp_path, JOBS, Maker(fail_after=2), SETTINGS, "base", PartialState())
    assert stopped.value.signal == 2
    maker = Maker()
    assert len(write_shared(tmp_path, JOBS, maker, SETTINGS, "base", PartialState())) == 4
    assert maker.made == JOBS[2:]


def test_what_cannot_be_drawn_leaves_the_folder_as_it_is(tmp_path):
    write_generation(tmp_path, JOBS, Maker(), SETTINGS, arm="base")
    before = manifest(tmp_path)

    def refuse(jobs):
        raise InputError("height 63 must be a multiple of 4")
        yield

    with pytest.raises(InputError):
        write_generation(tmp_path, JOBS, refuse, SETTINGS | {"steps": 9}, arm="base")
    assert manifest(tmp_path) == before
