"""The frozen text encoder for grounding, on a RoBERTa of a few kilobytes."""

from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaConfig, RobertaModel

from dpt_t2i.adapter.grounding_text import load_grounding_text
from dpt_t2i.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roberta")
    trained = ByteLevelBPETokenizer(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(["the red star left of the blue circle"] * 50, 300, 2, False, specials)
    trained.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer", "model_max_length": 16}')
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=300,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=20,
    )
    RobertaModel(config).save_pretrained(folder)
    return folder


def test_states_mask_and_offsets_belong_together(roberta: Path) -> None:
    encoder = load_grounding_text(str(roberta), CPU)
    texts = ["the red star", "blue"]
    encoded = encoder(texts)
    assert encoder.text_dim == 8
    assert encoded.tokens.shape == (2, encoded.mask.shape[1], 8)
    for text, mask, offsets in zip(texts, encoded.mask.tolist(), encoded.offsets, strict=True):
        assert len(offsets) == len(mask)
        words = "".join(text[start:end] for start, end in offsets)
        assert words == text.replace(" ", "")
        assert offsets[0] == (0, 0) and mask[0]  # <s>
    assert encoded.mask[1].sum() < encoded.mask[0].sum()


def test_frozen_and_in_eval_mode_whatever_the_training_loop_says(roberta: Path) -> None:
    encoder = load_grounding_text(str(roberta), CPU)
    torch.nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert torch.equal(encoder(["red star"]).tokens, encoder(["red star"]).tokens)
    assert not encoder(["red star"]).tokens.requires_grad


def test_a_long_text_is_cut(roberta: Path) -> None:
    assert load_grounding_text(str(roberta), CPU)(["red " * 60]).tokens.shape[1] == 16


def test_nothing_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="grounding_text"):
        load_grounding_text(str(tmp_path), CPU)
