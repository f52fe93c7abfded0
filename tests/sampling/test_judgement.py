"""One image against one prompt: the parts agree with the score itself, boxes land on the picture."""

import pytest
import torch
from PIL import Image

from dpt_t2i.adapter.postprocess import grounding_scores
from dpt_t2i.adapter.score import match_score
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.model import T2IModel
from dpt_t2i.sampling.noise import shared_noise
from dpt_t2i.scenes.example import make_example
from dpt_t2i.scenes.render import render
from tests.tiny import tiny_adapter, tiny_backbone

PROMPT = "a photo of a red circle and a blue star"


@pytest.fixture(scope="module")
def model() -> T2IModel:
    backbone = tiny_backbone()
    return T2IModel(backbone, tiny_adapter(backbone, seed=1))


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return render(make_example(3).scene, 32)


def test_the_phrases_are_those_of_the_prompt(model: T2IModel, image: Image.Image) -> None:
    judged = model.score(image, PROMPT, draws=1)
    assert [(e.phrase, PROMPT[slice(*e.span)]) for e in judged.phrases] == [("red circle",) * 2, ("blue star",) * 2]


def test_each_phrase_is_scored_alone(model: T2IModel, image: Image.Image) -> None:
    judged = model.score(image, PROMPT, timestep=300, draws=3, seed=5)
    for evidence in judged.phrases:
        alone = model.score(image, f"the {evidence.phrase}", timestep=300, draws=3, seed=5)
        assert evidence.score == pytest.approx(alone.score, abs=1e-5)
        assert evidence.score != pytest.approx(judged.score, abs=1e-6)
        assert 0 <= evidence.confidence <= 1


def test_the_box_is_that_of_the_most_confident_query(model: T2IModel, image: Image.Image) -> None:
    evidence = model.score(image, PROMPT, timestep=300, draws=1, seed=5).phrases[0]
    assert model.scorer is not None
    pixels = torch.tensor(list(image.getdata())).view(32, 32, 3).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = model.backbone.encode_image(pixels)
        step = torch.tensor([300])
        noisy = model.backbone.add_noise(latents, shared_noise(5, 0, latents.shape[1:])[None], step)
        text = model.backbone.encode_text(["the red circle"])
        output = model.scorer.read(noisy, step, text)
    assert evidence.score == pytest.approx(float(match_score(output, text.pooled)), abs=1e-5)
    confidence = grounding_scores(output.logits)[0]
    assert evidence.confidence == pytest.approx(float(confidence.max()), abs=1e-5)
    cx, cy, w, h = (32 * output.boxes[0, int(confidence.argmax())]).tolist()
    wanted = [min(max(v, 0), 32) for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)]
    assert evidence.box == pytest.approx(wanted, abs=1e-3)


def test_boxes_are_in_pixels_of_the_picture_that_was_given(model: T2IModel, image: Image.Image) -> None:
    small = model.score(image, PROMPT, draws=1).phrases[0]
    wide = Image.new("RGB", (256, 128), (127, 127, 127))
    wide.paste(image.resize((128, 128), Image.Resampling.NEAREST), (64, 0))
    for evidence in model.score(wide, PROMPT, draws=1).phrases:
        left, top, right, bottom = evidence.box
        assert 0 <= left <= right <= 256 and 0 <= top <= bottom <= 128
    large = model.score(image.resize((320, 320), Image.Resampling.NEAREST), PROMPT, draws=1).phrases[0]
    assert large.box == pytest.approx([10 * value for value in small.box], abs=6)


def test_the_marks_carry_phrase_and_confidence(model: T2IModel, image: Image.Image) -> None:
    judged = model.score(image, PROMPT, draws=1)
    for mark, evidence in zip(judged.marks(), judged.phrases, strict=True):
        assert mark.box == evidence.box and mark.label == f"{evidence.phrase} {evidence.confidence:.2f}"


def test_what_cannot_be_judged(model: T2IModel, image: Image.Image) -> None:
    with pytest.raises(InputError, match="needs an adapter"):
        T2IModel(model.backbone).score(image, PROMPT)
    with pytest.raises(InputError, match="the prompt is empty"):
        model.score(image, "  ")
    with pytest.raises(InputError, match="score_timestep 1000"):
        model.score(image, PROMPT, timestep=1000)


def test_a_prompt_that_is_no_text_is_one_line(model: T2IModel, image: Image.Image) -> None:
    with pytest.raises(InputError, match=r"prompt 'a red circle \\udcff' is no text; give it in UTF-8"):
        model.score(image, "a red circle \udcff")
