"""Which row of the encoded texts and latents stands for what, and where the boxes' words are."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dpt_t2i.data.examples import Batch
from dpt_t2i.errors import InputError
from dpt_t2i.training import encode
from dpt_t2i.training.encode import Encoder, report_cut
from tests.tiny import MAX_TOKENS, tiny_backbone

K = 7  # token classes


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images, hard, random = torch.rand(3, 3, 3, 32, 32, generator=generator) * 2 - 1
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    return Batch(
        images=images,
        hard_images=hard,
        random_images=random,
        captions=("a red circle", "a blue star", "a red circle"),
        hard_captions=("a blue circle", "", "a blue circle"),
        random_captions=("a blue star", "a red circle", "a green square"),
        has_hard_image=torch.tensor([True, False, False]),
        hard_pair=torch.tensor([True, False, False]),
        has_random_image=torch.tensor([True, True, False]),
        has_hard_caption=torch.tensor([True, False, True]),
        expressions=("the red circle", "", "the two stars"),
        spans=(((4, 14),), (), ((4, 13), (8, 13))),
        boxes=(box, torch.zeros(0, 4), torch.cat([box, box / 2])),
        records=(7, 0, 12),
    )


@pytest.fixture(scope="module")
def encoded(backbone, batch):
    return Encoder(backbone, K, None)(batch)


def test_every_distinct_text_is_encoded_once(backbone, batch, monkeypatch):
    calls = []
    real = backbone.encode_text
    monkeypatch.setattr(
        backbone, "encode_text", lambda texts, *rest: calls.append(list(texts)) or real(texts, *rest), raising=False
    )
    found = Encoder(backbone, K, None)(batch)
    assert len(calls) == 1 and len(found.text) == 7
    assert sorted(calls[0]) == sorted(
        ["", "a red circle", "a blue star", "a blue circle", "a green square", "the red circle", "the two stars"]
    )


@pytest.mark.parametrize("column", ["caption", "hard_caption", "random_caption", "expression"])
def test_rows_point_at_their_texts(backbone, batch, encoded, column):
    texts = getattr(batch, f"{column}s")
    found = encoded.text.select(getattr(encoded, column))
    for index, text in enumerate(texts):
        alone = backbone.encode_text([text])
        torch.testing.assert_close(found.pooled[index], alone.pooled[0])
        torch.testing.assert_close(found.tokens[index], alone.tokens[0])
        assert torch.equal(found.mask[index], alone.mask[0])
    assert torch.pdist(encoded.text.pooled).min() > 0.1, "else every row would do"


def test_the_null_row_is_the_empty_text(backbone, encoded):
    assert encoded.null.shape == (1,)
    torch.testing.assert_close(encoded.text.select(encoded.null).tokens, backbone.null_text(1).tokens)


def test_latents_are_own_then_hard_then_random(backbone, batch, encoded):
    assert encoded.latents.shape == (9, 4, 8, 8) and len(encoded) == 3
    columns = (batch.images, batch.hard_images, batch.random_images)
    exists = (torch.ones(3, dtype=torch.bool), batch.has_hard_image, batch.has_random_image)
    for start, images, there in zip((0, 3, 6), columns, exists, strict=True):
        wanted = backbone.encode_image(images) * there[:, None, None, None]  # where there is no picture: zeros
        torch.testing.assert_close(encoded.latents[start : start + 3], wanted)
    assert torch.equal(encoded.has_hard_image, batch.has_hard_image)
    assert torch.equal(encoded.has_hard_caption, batch.has_hard_caption)
    assert encoded.records == (7, 0, 12)


def test_positive_maps_by_hand(batch, encoded):
    first, second, third = encoded.targets.positive_map
    # BOS the red circle EOS: "red circle" is tokens 2 and 3.
    assert first.tolist() == [[0, 0, 0.5, 0.5, 0, 0, 0, 0]]
    assert second.shape == (0, K + 1)
    # BOS the two sta(r) -> the tiny vocabulary has no "stars": `the`, `two`, `sta`, `r`, `s`, so 2..5 and 3..5.
    assert third[0].tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25, 0, 0]
    assert third[1].tolist() == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0])
    assert encoded.targets.num_boxes() == 3
    assert all(torch.equal(a, b) for a, b in zip(encoded.targets.boxes, batch.boxes, strict=True))


def test_without_a_grounding_encoder_the_expressions_own_states_are_read(backbone, batch, encoded):
    alone = backbone.encode_text(list(batch.expressions))
    torch.testing.assert_close(encoded.grounding_tokens, alone.tokens)
    # BOS the red circle EOS; BOS EOS; BOS the two sta r s EOS
    assert encoded.grounding_mask.sum(dim=1).tolist() == [5, 2, 7]


def test_a_grounding_encoder_brings_its_own_tokens(backbone, batch):
    tokens, mask = torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool)
    offsets = (((0, 0), (0, 14), (0, 0), (0, 0)), ((0, 0),) * 4, ((0, 3), (4, 7), (8, 13), (0, 0)))

    def grounding(texts):
        assert tuple(texts) == batch.expressions
        return SimpleNamespace(tokens=tokens, mask=mask, offsets=offsets)

    found = Encoder(backbone, 3, grounding)(batch)
    assert found.grounding_tokens is tokens and found.grounding_mask is mask
    maps = found.targets.positive_map
    assert maps[0].tolist() == [[0, 1, 0, 0]] and maps[2].tolist() == [[0, 0.5, 0.5, 0], [0, 0, 1, 0]]
    assert found.text.tokens.shape[-1] == 32, "the denoiser still reads its own encoder"


def test_spans_beyond_the_text_name_the_record(backbone, batch):
    broken = replace(batch, spans=(((4, 14),), (), ((4, 13), (20, 25))))
    with pytest.raises(InputError, match=r"record 12, 'the two stars': spans \[\(20, 25\)\] touch no token"):
        Encoder(backbone, K, None)(broken)


def test_spans_beyond_the_text_are_masked_where_what_is_bad_is_skipped(backbone, batch, caplog):
    broken = replace(batch, spans=(((4, 14),), (), ((4, 13), (20, 25))))
    encoder = Encoder(backbone, K, None, skip_bad=True)
    for _ in range(2):
        targets = encoder(broken).targets
    assert [boxes.shape for boxes in targets.boxes] == [(1, 4), (0, 4), (0, 4)] and targets.num_boxes() == 1
    assert [rows.shape for rows in targets.positive_map] == [(1, K + 1), (0, K + 1), (0, K + 1)]
    told = [record.getMessage() for record in caplog.records if "grounding left out" in record.getMessage()]
    assert len(told) == 1 and "(1 so far): record 12, 'the two stars': spans [(20, 25)] touch no token" in told[0]


def test_truncation_is_told_once(backbone, batch, caplog):
    long = " ".join(["red"] * (MAX_TOKENS - 2)) + " blue star"  # BOS and EOS take two places: the end is cut
    cut = replace(batch, captions=(long, *batch.captions[1:]))
    encoder = Encoder(backbone, K, None)
    for _ in range(3):
        encoder(cut)
    told = [record.getMessage() for record in caplog.records if "reads: cut is" in record.getMessage()]
    assert len(told) == 1 and "cut is `blue star`" in told[0]


def test_every_cut_text_is_counted_and_written(backbone, batch, tmp_path, caplog):
    encoder = Encoder(backbone, K, None)
    encoder(batch)
    report_cut(encoder, tmp_path)
    assert not encoder.cut and not list(tmp_path.iterdir()), "nothing was cut"
    longs = [" ".join(["red"] * (MAX_TOKENS - 2)) + f" {word}" for word in ("blue", "green")]
    encoder(replace(batch, captions=(longs[0], *batch.captions[1:])))
    encoder(replace(batch, captions=(longs[0], *batch.captions[1:]), random_captions=(longs[1], "", "")))
    report_cut(encoder, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "cut_texts.jsonl").read_text().splitlines()]
    assert rows == [{"text": longs[0], "cut": "blue"}, {"text": longs[1], "cut": "green"}]
    assert "2 texts were over the text encoder's limit" in caplog.text


def test_a_hard_caption_that_reads_as_the_caption_is_left_out_and_told_once(backbone, batch, caplog):
    long = " ".join(["red"] * (MAX_TOKENS - 2))
    alike = replace(
        batch,
        captions=(f"{long} star", "a blue star", "a red circle"),
        hard_captions=(f"{long} square", "", "A RED circle"),
        hard_pair=torch.tensor([True, False, True]),
    )
    encoder = Encoder(backbone, K, None)
    for _ in range(2):
        encoded = encoder(alike)
        assert encoded.has_hard_caption.tolist() == encoded.hard_pair.tolist() == [False, False, False]

    def told():
        return [r.getMessage() for r in caplog.records if "reads as the true one are left out" in r.getMessage()]

    assert len(told()) == 1 and told()[0].endswith("such as `{}`".format(f"{long} square"))
    capitals = replace(batch, hard_captions=("A RED circle", "", "a blue circle"))
    Encoder(backbone, K, None)(capitals)
    assert len(told()) == 2 and told()[1].endswith("such as `A RED circle`")
    Encoder(backbone, K, None)(replace(alike, hard_captions=(f"{long} square", "", "a blue circle")))
    assert len(told()) == 3 and told()[2] == told()[0]
    assert encoder(batch).has_hard_caption.tolist() == [True, False, True]


def test_nothing_asks_for_a_gradient(backbone, encoded):
    assert not encoded.latents.requires_grad and not encoded.text.tokens.requires_grad


def test_the_vae_sees_a_few_images_at_a_time(backbone, batch, encoded, monkeypatch):
    sizes = []
    real = backbone.encode_image
    monkeypatch.setattr(backbone, "encode_image", lambda images: sizes.append(len(images)) or real(images))
    found = Encoder(backbone, K, None, vae_batch_size=4)(batch)
    assert sizes == [4, 2], "six pictures exist: three own, one hard, two random"
    torch.testing.assert_close(found.latents, encoded.latents)


def test_a_run_that_goes_on_names_what_was_cut_before_and_not_all_of_a_large_corpus(
    backbone, batch, tmp_path, caplog, monkeypatch
):
    long = " ".join(["red"] * (MAX_TOKENS - 2))
    for word in ("blue", "green"):  # two parts of one run, each with an encoder of its own
        encoder = Encoder(backbone, K, None)
        encoder(replace(batch, captions=(f"{long} {word}", *batch.captions[1:])))
        report_cut(encoder, tmp_path)
    rows = [json.loads(line)["cut"] for line in (tmp_path / "cut_texts.jsonl").read_text().splitlines()]
    assert rows == ["blue", "green"]
    monkeypatch.setattr(encode, "KEPT", 2)
    for word in ("star", "square", "circle"):
        encoder(replace(batch, captions=(f"{long} {word}", *batch.captions[1:])))
    assert len(encoder.cut) == 2, "no more are held in memory"
    report_cut(encoder, tmp_path)
    assert len((tmp_path / "cut_texts.jsonl").read_text().splitlines()) == 2
    assert "at least 2 texts were over" in caplog.text
