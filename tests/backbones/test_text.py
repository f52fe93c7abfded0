"""Tokens, truncation, EOS and offsets; partly against the release's own numbers (tests/parity/clip)."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from dpt_t2i.backbones import text as clip_text
from dpt_t2i.errors import InputError
from tests.tiny import tiny_backbone

CLIP = Path(__file__).parents[1] / "parity" / "clip"
LONG = "a red circle " * 6 + "below the star"  # 18 + 3 words, BOS and EOS: 23 tokens and a limit of 16


def test_token_states_and_pooled_vector_are_the_releases():
    # Its text config says eos_token_id 2 while the tokenizer's EOS is 663: pooling by the config would be wrong.
    backbone = tiny_backbone()
    backbone.pipeline.text_encoder = CLIPTextModel.from_pretrained(CLIP / "text_encoder").eval()
    backbone.pipeline.tokenizer = CLIPTokenizer.from_pretrained(CLIP / "tokenizer")
    backbone._limit = 77
    expected = load_file(CLIP / "expected.safetensors")
    texts = ["a red dog on the left of a blue chair", "the second bus from the left"]
    tokenized = clip_text.tokenize(backbone.pipeline.tokenizer, texts, 77, "warn")
    assert torch.equal(tokenized.ids, expected["input_ids"].long())
    states = backbone.encode_text(texts)
    torch.testing.assert_close(states.tokens, expected["encoder_hidden_states"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.pooled, expected["pooler_output"], rtol=1e-4, atol=1e-5)


def test_token_states_are_what_the_pipeline_feeds():
    backbone = tiny_backbone()
    prompts = ["a red circle", ""]
    theirs, _ = backbone.pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(backbone.encode_text(prompts).tokens, theirs)


@pytest.mark.parametrize("stated", [2, 49407, 0])
def test_pooling_does_not_trust_the_text_config(stated):
    backbone = tiny_backbone()
    prompts = ["a red circle", "a blue square left of the star"]
    expected = backbone.encode_text(prompts).pooled
    assert not torch.allclose(expected[0], expected[1])
    backbone.pipeline.text_encoder.config.eos_token_id = stated
    backbone.pipeline.text_encoder.eos_token_id = stated
    assert torch.equal(backbone.encode_text(prompts).pooled, expected)


def test_pooled_vector_is_the_state_at_the_first_eos_and_the_mask_ends_there():
    backbone = tiny_backbone()
    states = backbone.encode_text(["a red circle"])  # BOS a red circle EOS: EOS at position 4
    assert states.mask[0].tolist() == [True] * 5 + [False] * 11
    assert torch.equal(states.pooled[0], states.tokens[0, 4])


def test_offsets_point_at_the_words_and_line_up_with_the_tokens():
    backbone = tiny_backbone()
    prompt = "a  Red circle, left"
    offsets = backbone.token_offsets([prompt, "star"])
    assert [len(row) for row in offsets] == [16, 16]
    assert [prompt[start:end] for start, end in offsets[0][:7]] == ["", "a", "Red", "circle", ",", "left", ""]
    assert offsets[0][6:] == [(0, 0)] * 10
    ids = backbone.pipeline.tokenizer(prompt).input_ids
    assert backbone.pipeline.tokenizer.convert_ids_to_tokens(ids)[2] == "red</w>"


def test_one_warning_says_what_is_cut(caplog):
    backbone = tiny_backbone()
    with caplog.at_level(logging.WARNING):
        states = backbone.encode_text([LONG, LONG, "a star"])
    assert len(caplog.records) == 1
    # 14 words fit between BOS and EOS: four times `a red circle`, then `a red`.
    assert "16 tokens: cut is `circle a red circle below the star` of" in caplog.text
    assert "(and 1 more)" in caplog.text
    assert torch.equal(states.pooled[0], states.tokens[0, 15])


def test_no_warning_without_a_cut_or_when_told_so(caplog):
    backbone = tiny_backbone()
    backbone.encode_text(["a red circle " * 4 + "a star"])  # 14 words: just fits
    backbone.encode_text([LONG], on_truncate="ignore")
    assert not caplog.records
    with pytest.raises(InputError, match="cut is"):
        backbone.encode_text([LONG], on_truncate="error")


def test_a_tokenizer_that_never_says_eos_is_refused():
    tokenizer = tiny_backbone().pipeline.tokenizer
    tokenizer.eos_token = "!"
    with pytest.raises(InputError, match="EOS token `!`"):
        clip_text.tokenize(tokenizer, ["a star"], 16, "ignore")


def test_parity_texts_of_the_release_have_the_same_ids():
    tokenizer = CLIPTokenizer.from_pretrained(CLIP / "tokenizer")
    for prompt, ids in json.loads((CLIP / "tokenization.json").read_text(encoding="utf-8")).items():
        assert clip_text.tokenize(tokenizer, [prompt], 77, "warn").ids[0].tolist() == ids
