"""The nearest against a whole matrix, what counts as a duplicate, and what is written into the metadata."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dpt_t2i.data import mine
from dpt_t2i.data.mine import Near, add_mined, embed, nearest, read_miner
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.errors import InputError


def vectors(count, seed, width=6):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("chunk", [4, 23, 100])
def test_chunks_find_what_the_whole_matrix_holds(chunk):
    images, texts = vectors(23, 0), vectors(23, 1)
    found = list(nearest(images, texts, 3, 0.6, chunk))
    assert len(found) == 23
    left_out = 0
    for i, near in enumerate(found):
        allowed = [
            j for j in range(23) if j != i and float(images[i] @ images[j]) <= 0.6 and float(texts[i] @ texts[j]) <= 0.6
        ]
        left_out += 22 - len(allowed)
        by_caption = sorted(allowed, key=lambda j: -float(images[i] @ texts[j]))[:3]
        by_image = sorted(allowed, key=lambda j: -float(texts[i] @ images[j]))[:3]
        assert [j for j, _ in near.captions] == by_caption and [j for j, _ in near.images] == by_image
        assert near.captions[0][1] == pytest.approx(float(images[i] @ texts[by_caption[0]]), abs=1e-4)
    assert left_out > 23, "else the duplicates are not put to the test"


def test_a_stopped_search_goes_on(tmp_path, monkeypatch):
    images, texts = vectors(10, 1), vectors(10, 2)
    whole = list(nearest(images, texts, 3, 0.6, 4))
    first = nearest(images, texts, 3, 0.6, 4, tmp_path)
    assert [next(first) for _ in range(5)] == whole[:5]  # stopped inside the second of three chunks
    searched, search = [], mine.nearest_of

    def watched(q, *rest):
        searched.append(q.tolist())
        return search(q, *rest)

    monkeypatch.setattr(mine, "nearest_of", watched)
    assert list(nearest(images, texts, 3, 0.6, 4, tmp_path)) == whole and searched == [[8, 9]]
    assert list(nearest(images, texts, 3, 0.6, 4, tmp_path)) == whole and len(searched) == 1
    other = list(nearest(images, vectors(10, 3), 3, 0.6, 4, tmp_path))
    assert other != whole and len(searched) == 4, "what was found for other captions is not this"


def test_duplicates_of_either_side_are_no_negatives():
    images = torch.eye(4)
    texts = torch.eye(4)
    images[1], texts[2] = images[0], texts[0]  # 1 shows what 0 shows, 2 says what 0 says
    near = next(iter(nearest(images, texts, 3, 0.9)))
    assert [j for j, _ in near.captions] == [3] == [j for j, _ in near.images]


def encoder(calls, fail_after=None):
    def images(pictures):
        calls.append(len(pictures))
        if fail_after is not None and len(calls) > fail_after:
            raise KeyboardInterrupt
        return torch.stack([torch.tensor(list(p.resize((2, 2)).tobytes()[:4])).float() for p in pictures])

    return SimpleNamespace(
        name="stub",
        fingerprint={"text_encoder": "ab", "image_encoder": "cd"},
        images=images,
        texts=lambda texts: torch.tensor([[float(len(text))] * 4 for text in texts]),
    )


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(mine, "BLOCK", 4)
    records = SceneRecords("val", 10, 32)[:]
    whole = embed(records, encoder([]), tmp_path / "whole", 2)
    assert whole[0].shape == whole[1].shape == (10, 4)
    assert whole[1][:, 0].tolist() == [len(record.captions[0]) for record in records]
    with pytest.raises(KeyboardInterrupt):
        embed(records, encoder([], fail_after=3), tmp_path / "stopped", 2)
    calls: list[int] = []
    again = embed(records, encoder(calls), tmp_path / "stopped", 2)
    assert sum(calls) == 6  # the first block of four was done
    assert torch.equal(again[0], whole[0]) and torch.equal(again[1], whole[1])
    other = encoder(calls)
    other.fingerprint = {"text_encoder": "ab", "image_encoder": "ce"}
    embed(records, other, tmp_path / "stopped", 2)
    assert sum(calls) == 16  # of another encoder nothing is there


def rows():
    return [{"file_name": f"{n}.png", "captions": [f"caption {n}", f"also {n}"]} for n in range(4)]


NEAR = [Near(((1, 0.9), (2, 0.8)), ((2, 0.7), (1, 0.6)))] + [Near((), ())] * 3


def test_the_nearest_image_brings_its_caption_to_the_front():
    entries = rows()
    entries[0]["negatives"] = [{"caption": "by rule", "rule": "swap_objects"}]
    mined = add_mined(entries, NEAR)
    assert mined[0]["negative_file"] == "2.png"
    assert [n["caption"] for n in mined[0]["negatives"]] == ["caption 2", "by rule", "caption 1"]
    assert "negative_file" not in mined[1] and mined[1]["negatives"] == []
    assert add_mined(mined, NEAR) == mined  # mined again, the earlier ones are taken out
    assert add_mined(mined, [Near((), ())] * 4)[0]["negatives"] == [{"caption": "by rule", "rule": "swap_objects"}]


def test_a_negative_image_that_is_there_stays():
    entries = rows()
    entries[0] |= {"negatives": [{"caption": "true of n", "rule": "swap_objects"}], "negative_file": "n.png"}
    entries[1] |= {"negative_file": "n.png"}  # nobody knows what is true of it
    mined = add_mined(entries, [NEAR[0], NEAR[0], *NEAR[2:]])
    assert mined[0]["negative_file"] == "n.png"
    assert [n["caption"] for n in mined[0]["negatives"]] == ["true of n", "caption 1", "caption 2"]
    assert mined[1] == entries[1]


def test_a_caption_of_the_record_itself_is_no_negative():
    entries = rows()
    entries[2]["captions"] = ["ALSO 0"]
    mined = add_mined(entries, NEAR)[0]
    assert mined["negative_file"] == "1.png"
    assert [n["caption"] for n in mined["negatives"]] == ["caption 1"]


def test_a_header_that_is_broken_is_one_line(tmp_path):
    assert read_miner(tmp_path) is None
    (tmp_path / "mined.jsonl").write_text(json.dumps({"file_name": "x"}) + "\n")
    with pytest.raises(InputError, match="does not say who mined"):
        read_miner(tmp_path)


def test_a_caption_that_a_rule_made_is_not_added_once_more():
    rows = [
        {"file_name": "0.png", "captions": ["a"], "negatives": [{"caption": "b", "rule": "swap_objects"}],
         "negative_file": "x.png"},
        {"file_name": "1.png", "captions": ["b"]},
        {"file_name": "2.png", "captions": ["c"]},
    ]  # fmt: skip
    (mined, *_) = add_mined(rows, [Near(((1, 0.9), (2, 0.8)), ()), Near((), ()), Near((), ())])
    assert [negative["caption"] for negative in mined["negatives"]] == ["b", "c"]
