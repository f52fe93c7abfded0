"""Encoders into one space: against transformers' own similarity, and the bundled pair on what it was trained for."""

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from dpt_t2i.backbones.image_text import load_image_text
from dpt_t2i.errors import InputError
from dpt_t2i.scenes.example import make_example
from dpt_t2i.scenes.render import render
from tests.tiny import MAX_TOKENS, tiny_tokenizer

TEXTS = ["a red circle", "two blue star and a square of green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def test_a_clip_folder_gives_transformers_own_similarities(folder):
    pictures = [render(make_example(n).scene, 48) for n in range(3)]
    encoder = load_image_text(str(folder), "cpu")
    model = CLIPModel.from_pretrained(folder).eval()
    processor, tokenizer = CLIPImageProcessor.from_pretrained(folder), tiny_tokenizer()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, pixel_values=processor(images=pictures, return_tensors="pt")["pixel_values"])
    expected = output.logits_per_image / model.logit_scale.exp()
    images, texts = encoder.images(pictures), encoder.texts(TEXTS)
    torch.testing.assert_close(images @ texts.T, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))


def test_the_bundled_pair_prefers_a_pictures_own_caption():
    examples = [make_example(n, seed=5, split="val") for n in range(32)]
    encoder = load_image_text("bundled", "cpu")
    images = encoder.images([render(e.scene, 80) for e in examples])
    texts = encoder.texts([e.caption.text for e in examples])
    similarity = images @ texts.T
    others = (similarity.sum(1) - similarity.diag()) / 31
    assert float((similarity.diag() > others).float().mean()) > 0.9
    ranks = (similarity > similarity.diag()[:, None]).sum(1).float()
    assert float(ranks.mean()) < 6  # of 31; chance is 15.5


def test_what_embeds_nothing_is_one_line(tmp_path):
    with pytest.raises(InputError, match="does not load"):
        load_image_text(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (
            "\nSiglipTokenizer requires the SentencePiece library but it was not found. Check out the\npage",
            r"dpt-t2i\[siglip\]",
        ),
        ("\nFastTokenizer requires the tiktoken library.\nMore", "requires the tiktoken library.$"),
    ],
)
def test_a_tokenizer_that_needs_a_package_is_one_line(folder, monkeypatch, missing, says):
    def refuse(_):
        raise ImportError(missing)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(InputError, match=says):
        load_image_text(str(folder), "cpu")
