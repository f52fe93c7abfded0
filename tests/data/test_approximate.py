"""The search by an index against the exact one, and which of the two is taken."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dpt_t2i.config import MineConfig
from dpt_t2i.data import approximate
from dpt_t2i.data.approximate import choose_search, nearest_by_index
from dpt_t2i.data.mine import Near, nearest
from dpt_t2i.errors import InputError
from dpt_t2i.scenes.commands import export_scenes
from dpt_t2i.training import mining
from tests.data.test_mine import vectors

ALL = 10**6  # probes: more than there are lists
PAIRS = 100


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


def rows_of(found):
    return [([row for row, _ in near.captions], [row for row, _ in near.images]) for near in found]


def cosines_of(found):
    return torch.tensor([[cosine for _, cosine in (*near.captions, *near.images)] for near in found])


def planted():
    """2,000 records. To the image of each of the first 100 comes near the caption of the record 100 further on, and to
    its caption that one's image; nothing else of the two is alike."""
    images, texts = vectors(2000, 0, 32), vectors(2000, 1, 32)
    for side, (asked, offered) in enumerate([(images, texts), (texts, images)]):
        offered[PAIRS : 2 * PAIRS] = F.normalize(asked[:PAIRS] + 0.2 * vectors(PAIRS, 2 + side, 32), dim=-1)
    return images, texts


def test_an_index_that_looks_everywhere_finds_what_the_exact_search_finds(faiss):
    images, texts = vectors(500, 0, 16), vectors(500, 1, 16)
    exact, found = (
        list(search(images, texts, 3, 0.6, chunk=200, **more))
        for search, more in ((nearest, {}), (nearest_by_index, {"probes": ALL}))
    )
    assert len(found) == 500 and rows_of(found) == rows_of(exact)
    torch.testing.assert_close(cosines_of(found), cosines_of(exact), rtol=0, atol=2e-4)  # each is rounded to 4 digits
    others = list(nearest(images, texts, 3, 1.0))
    assert rows_of(others) != rows_of(exact), "else the duplicates are not put to the test"


def test_what_comes_near_is_found_where_few_lists_are_looked_into(faiss):
    images, texts = planted()
    found = list(nearest_by_index(images, texts, 3, 0.95, probes=8))  # of 51
    for row, near in enumerate(found[:PAIRS]):
        assert near.captions[0][0] == near.images[0][0] == row + PAIRS
        assert near.captions[0][1] == pytest.approx(float(images[row] @ texts[row + PAIRS]), abs=1e-4)
        assert near.images[0][1] == pytest.approx(float(texts[row] @ images[row + PAIRS]), abs=1e-4)
    assert all(len(near.captions) == len(near.images) == 3 for near in found)
    assert rows_of(found) != rows_of(nearest(images, texts, 3, 0.95)), "else it is no index"
    fewest = rows_of(nearest_by_index(images, texts, 3, 0.95, probes=1))  # a list may hold less than was asked for
    assert all(row in range(2000) for sides in fewest for side in sides for row in side)
    assert list(nearest_by_index(images, texts, 3, 0.95, probes=8)) == found


def test_a_gap_between_images_and_captions_hides_little(faiss):
    draw = torch.Generator().manual_seed(0)
    records = torch.randn(100, 64, generator=draw).repeat(20, 1) + torch.randn(2000, 64, generator=draw)
    gap = 2 * torch.randn(64, generator=draw)
    images, texts = (F.normalize(records + side * gap, dim=-1) for side in (1, -1))
    exact, found = nearest(images, texts, 3, 0.95), nearest_by_index(images, texts, 3, 0.95, probes=8)
    both = [zip(*sides, strict=True) for sides in zip(rows_of(exact), rows_of(found), strict=True)]
    kept = [len({*want} & {*got}) / 3 for sides in both for want, got in sides]
    assert sum(kept) / len(kept) > 0.85, "0.79 with centroids of length 1"


def test_a_record_is_never_its_own_negative(faiss):
    images = vectors(100, 0, 16)
    texts = F.normalize(images + 0.3 * vectors(100, 1, 16), dim=-1)
    found = rows_of(nearest_by_index(images, texts, 3, 1.0))  # so high that no two are taken for the same
    assert found == rows_of(nearest(images, texts, 3, 1.0))
    assert not any(row in (*captions, *images) for row, (captions, images) in enumerate(found))


def test_duplicates_of_either_side_are_no_negatives(faiss):
    images, texts = torch.eye(50), torch.eye(50)
    images[1], texts[2] = images[0], texts[0]  # 1 shows what 0 shows, 2 says what 0 says
    texts[3] = F.normalize(texts[3] + 0.5 * texts[0], dim=-1)
    images[4] = F.normalize(images[4] + 0.5 * images[0], dim=-1)
    near = next(nearest_by_index(images, texts, 1, 0.9))
    assert rows_of([near]) == [([3], [4])]


def test_a_record_with_more_duplicates_than_candidates_is_compared_with_all(faiss, monkeypatch):
    images, texts = vectors(200, 0, 16), vectors(200, 1, 16)
    alike = images[0].clone()
    for side, part in enumerate((images, texts)):  # 3 negatives are wanted, of 44 candidates
        part[:60] = F.normalize(alike + 0.1 * vectors(60, 2 + side, 16), dim=-1)
    exact, asked = list(nearest(images, texts, 3, 0.9)), []

    def watched(q, *rest):
        asked.extend(q.tolist())
        return nearest_of(q, *rest)

    nearest_of = approximate.nearest_of
    monkeypatch.setattr(approximate, "nearest_of", watched)
    assert rows_of(nearest_by_index(images, texts, 3, 0.9, probes=ALL)) == rows_of(exact)
    assert asked == list(range(60))
    assert list(nearest_by_index(images[:2], texts[:2], 3, 0.9)) == [Near((), ())] * 2


def test_a_stopped_search_goes_on_and_reads_nothing_of_another(faiss, tmp_path, monkeypatch):
    images, texts = planted()
    exact = list(nearest(images, texts, 3, 0.95, 800, tmp_path))
    built, build = [], approximate._index
    monkeypatch.setattr(approximate, "_index", lambda *given: built.append(given[1]) or build(*given))
    first = nearest_by_index(images, texts, 3, 0.95, 800, tmp_path, probes=2)
    begun = [next(first) for _ in range(900)]  # stopped inside the second of three chunks
    whole = list(nearest_by_index(images, texts, 3, 0.95, 800, tmp_path, probes=2))
    assert whole[:900] == begun and len(whole) == 2000 and whole != exact and built == [2] * 4
    assert list(nearest_by_index(images, texts, 3, 0.95, 800, tmp_path, probes=2)) == whole
    assert len(built) == 4, "all chunks are kept, so that no index is wanted"
    assert list(nearest_by_index(images, texts, 3, 0.95, 800, tmp_path, probes=3)) != whole
    assert list(nearest(images, texts, 3, 0.95, 800, tmp_path)) == exact
    assert len(list((tmp_path / "nearest").iterdir())) == 3


def test_auto_takes_the_index_from_a_count_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace())
    monkeypatch.setattr(approximate, "FAISS_FROM", 10)
    assert [choose_search("auto", count) for count in (9, 10, 11)] == ["exact", "faiss", "faiss"]
    assert choose_search("exact", 11) == "exact" and choose_search("faiss", 2) == "faiss"


def test_the_settings_and_the_docs_say_from_which_count_on():
    count = f"{approximate.FAISS_FROM:,} records"
    assert count in MineConfig.model_fields["search"].description
    assert count in (Path(__file__).parents[2] / "docs" / "negatives.md").read_text()


def test_auto_without_faiss_is_exact_and_says_what_would_help(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "faiss", None)  # import fails
    monkeypatch.setattr(approximate, "FAISS_FROM", 10)
    assert choose_search("auto", 9) == choose_search("exact", 10) == "exact" and not caplog.records
    assert choose_search("auto", 10) == "exact"
    (line,) = caplog.messages
    assert "all pairs of 10 records" in line and 'pip install "dpt-t2i[faiss]"' in line


class Stub:
    """Tells pictures by their pixels and texts by their letters."""

    name = "stub"
    fingerprint = {"text_encoder": "ab"}

    def images(self, pictures):
        return F.normalize(
            torch.stack([torch.tensor(list(p.convert("RGB").resize((3, 3)).tobytes())).float() for p in pictures])
            - 128,
            dim=-1,
        )

    def texts(self, texts):
        return F.normalize(
            torch.tensor([[float(text.count(chr(97 + n))) for n in range(27)] for text in texts]) - 1, dim=-1
        )


def test_without_faiss_the_mend_is_named_before_anything_is_encoded(tmp_path, monkeypatch):
    export_scenes(tmp_path, n=2)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(mining, "load_image_text", lambda *_: pytest.fail("encoder loaded"))
    with pytest.raises(InputError, match=r'search faiss needs `faiss`: pip install "dpt-t2i\[faiss\]"'):
        mining.run_mine(MineConfig(dataset=tmp_path, device="cpu", search="faiss"))


def test_the_header_says_which_search_it_was(faiss, tmp_path, monkeypatch):
    export_scenes(tmp_path / "scenes", n=12, seed=4)
    monkeypatch.setattr(mining, "load_image_text", lambda *_: Stub())
    told = {}
    for search in ("auto", "faiss"):
        config = MineConfig(dataset=tmp_path / "scenes", device="cpu", output_dir=tmp_path / "out", search=search)
        mining.run_mine(config)
        header, *told[search] = map(json.loads, (tmp_path / "scenes" / "mined.jsonl").read_text().splitlines())
        assert header["search"] == {"auto": "exact"}.get(search, search) and header["records"] == 12
    found = [[[n["file_name"] for n in line["images"]] for line in lines] for lines in told.values()]
    assert found[0] == found[1] and any(found[0]), "of twelve none is overlooked"
    assert len(list((tmp_path / "out" / "nearest").iterdir())) == 2
