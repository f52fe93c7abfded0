"""Outside judges, each against transformers' own words about one pair at a time."""

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipModel,
)

from dpt_t2i.backbones.image_text import load_image_text
from dpt_t2i.backbones.pair_scorer import load_pair_scorer
from dpt_t2i.errors import InputError
from dpt_t2i.scenes.example import make_example
from dpt_t2i.scenes.render import render

TEXTS = ["a red circle", "two blue star and a square of green", "a star"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a and of the green red blue circle square star two".split()]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def blip_config() -> BlipConfig:
    text = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 12, "encoder_hidden_size": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    return BlipConfig(text_config=text | ids, vision_config=vision, image_text_hidden_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("blip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlipForImageTextRetrieval(blip_config())
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)  # its own start makes all pairs alike
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def pictures() -> list[Image.Image]:
    return [render(make_example(n).scene, 48) for n in range(3)]


def test_blip_gives_the_head_and_the_cosine_of_each_pair(folder):
    scorer = load_pair_scorer(str(folder), "cpu")
    assert scorer.measures == ("itm", "itc") and set(scorer.fingerprint) == {"text_encoder", "image_encoder"}
    scores, other = scorer.score(pictures(), [TEXTS, TEXTS[::-1]])
    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    tokenizer, processor = BertTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    for i, (picture, text) in enumerate(zip(pictures(), TEXTS, strict=True)):
        inputs = {**tokenizer(text, return_tensors="pt"), **processor(images=picture, return_tensors="pt")}
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        with torch.no_grad():
            no, yes = model(**inputs).itm_score[0].tolist()
            cosine = model(**inputs, use_itm_head=False).itm_score.item()
        assert scores["itm"][i].item() == pytest.approx(1 / (1 + torch.tensor(no - yes).exp().item()), rel=1e-4)
        assert scores["itc"][i].item() == pytest.approx(cosine, rel=1e-4, abs=1e-6)
    assert len(set(scores["itm"].tolist())) == 3 and scores["itm"].shape == (3,)
    (again,) = scorer.score(pictures()[1:2], [TEXTS[1:2]])  # neighbours in a batch change nothing
    assert again["itm"].item() == pytest.approx(scores["itm"][1].item(), rel=1e-4)
    assert other["itc"][1].item() == pytest.approx(scores["itc"][1].item(), rel=1e-4)  # the middle text is the same
    assert other["itc"][0].item() != pytest.approx(scores["itc"][0].item(), rel=1e-4)


def test_the_bundled_pair_gives_the_cosine():
    encoder, scorer = load_image_text("bundled", "cpu"), load_pair_scorer("bundled", "cpu")
    (scores,) = scorer.score(pictures(), [TEXTS])
    assert scorer.measures == ("cosine",) and scorer.fingerprint == encoder.fingerprint
    torch.testing.assert_close(scores["cosine"], (encoder.images(pictures()) @ encoder.texts(TEXTS).T).diagonal())


def test_texts_that_are_not_read_whole_are_known(folder):
    fits = "a red star and a blue star and a star"  # 12 tokens with both ends, as many as are read
    long = f"{fits} and"
    assert load_pair_scorer(str(folder), "cpu").cut([fits, long, *TEXTS[:1]]) == [long]
    much = "a red circle and " * 40
    assert load_pair_scorer("bundled", "cpu").cut([much, fits]) == [much]


def test_what_scores_no_pairs_is_one_line(folder, tmp_path):
    with pytest.raises(InputError, match=f"scorer `{tmp_path}` does not load"):
        load_pair_scorer(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="does not load"):
        load_pair_scorer(str(tmp_path), "cpu")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    BlipModel(blip_config()).save_pretrained(tmp_path)  # the same family without the heads
    with pytest.raises(InputError, match="has no itm_head; give a BLIP for image-text retrieval"):
        load_pair_scorer(str(tmp_path), "cpu")


def test_a_model_that_embeds_but_has_not_the_two_towers_is_one_line(folder, monkeypatch, tmp_path):
    class Embeds(torch.nn.Module):
        """As BLIP-2: both vectors, and no `text_model`."""

        def get_image_features(self): ...
        def get_text_features(self): ...

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lambda *_, **__: Embeds())
    with pytest.raises(InputError, match="does not embed images and texts"):
        load_image_text(str(folder), "cpu")
