"""`dpt data mine` on a small folder, and the warning of an evaluation that shares the miner's encoder."""

import json

import pytest

from dpt_t2i.backbones.fingerprint import part_hashes
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.config import MineConfig
from dpt_t2i.data.imagefolder import read_imagefolder
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.miner import miner_warnings
from dpt_t2i.scenes.commands import export_scenes
from dpt_t2i.training.mining import run_mine


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mined")
    export_scenes(folder / "scenes", n=12, seed=4)
    entries = rows(folder / "scenes")
    for entry in entries[:6]:
        del entry["negatives"], entry["negative_file"]
    (folder / "scenes" / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    config = MineConfig(dataset=folder / "scenes", device="cpu", top_k=2, output_dir=folder / "embeddings")
    return config, entries, run_mine(config)


def test_a_negative_image_shows_what_the_first_negative_says(mined):
    config, entries, _ = mined
    told = {entry["file_name"]: entry["captions"][0] for entry in entries}
    records = read_imagefolder(config.dataset)
    for record in records[:6]:
        assert told[record.negative_image.name] == record.negatives[0].caption
        assert record.negative_image.name != record.id and record.negatives[0].caption not in record.captions
        assert {negative.rule for negative in record.negatives} == {"mined"}
    for record in records[6:]:
        assert record.negatives[0].rule != "mined" and record.negative_image.parent.name == "negatives"


def test_the_header_says_who_mined(mined):
    config, _, result = mined
    header, *lines = (config.dataset / "mined.jsonl").read_text().splitlines()
    assert json.loads(header)["encoder"] == "bundled" and json.loads(header)["top_k"] == 2
    assert json.loads(header)["fingerprint"] == result["fingerprint"]
    assert len(lines) == 12 and all(len(json.loads(line)["captions"]) <= 2 for line in lines)


def test_again_nothing_changes(mined):
    config, _, result = mined
    before = rows(config.dataset)
    assert run_mine(config) == result
    assert rows(config.dataset) == before


def test_a_metric_with_the_miners_encoder_is_called_out(mined, tmp_path):
    config, _, _ = mined
    parts = part_hashes(load_backbone("bundled", device="cpu").pipeline)
    (warning,) = miner_warnings(config.dataset, parts, "matching score")
    assert "mined with `bundled`, whose text_encoder the matching score uses too" in warning
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "mined.jsonl").write_bytes((config.dataset / "mined.jsonl").read_bytes())
    assert miner_warnings(tmp_path, parts, "matching score") == [warning]
    assert miner_warnings(config.dataset, {"text_encoder": "another"}, "matching score") == []
    assert miner_warnings(tmp_path / "none", parts, "matching score") == []


def test_one_record_is_not_enough(tmp_path):
    export_scenes(tmp_path, n=1)
    with pytest.raises(InputError, match="one record"):
        run_mine(MineConfig(dataset=tmp_path, device="cpu"))


def test_a_broken_line_ends_it_without_naming_an_option_that_it_lacks(tmp_path):
    export_scenes(tmp_path, n=2)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(InputError, match="line 3: key 'file_name' is missing; mend the line") as caught:
        run_mine(MineConfig(dataset=tmp_path, device="cpu"))
    assert "on_bad" not in str(caught.value)


def test_a_row_whose_negative_is_a_picture_alone_is_counted_as_none(tmp_path):
    export_scenes(tmp_path / "scenes", n=4, seed=4)
    entries = rows(tmp_path / "scenes")
    for entry in entries:
        del entry["negatives"]
    (tmp_path / "scenes" / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = run_mine(MineConfig(dataset=tmp_path / "scenes", device="cpu", top_k=1, output_dir=tmp_path / "work"))
    assert found["captions"] == 0 and found["records"] == 4
