"""From records to fixed examples, and their noise."""

import torch
from PIL import Image

from dpt_t2i.data.records import Expression, Negative, Record
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.evaluation.examples import chunks, examples_of
from dpt_t2i.sampling.model import T2IModel
from dpt_t2i.scenes.example import make_example
from dpt_t2i.scenes.render import render


def test_a_record_is_seen_as_its_first_caption_negative_and_single_expression() -> None:
    picture = render(make_example(0).scene, 32)
    record = Record(
        id="7",
        source="mine",
        image=lambda: picture,
        captions=("first", "second"),
        expressions=(
            Expression("the two stars", ((4, 13),) * 2, ((0, 0, 8, 8), (16, 16, 8, 8))),
            Expression("the circle", ((4, 10),), ((8, 16, 16, 8),)),
        ),
        negatives=(Negative("wrong", "swap_colors"), Negative("worse", "mined")),
        negative_image=lambda: picture,
    )
    (example,) = examples_of([record], 32)
    assert (example.id, example.caption, example.hard_caption) == ("mine/7", "first", "wrong")
    assert (example.rule, example.expression) == ("swap_colors", "the circle")
    assert example.boxes is not None
    torch.testing.assert_close(example.boxes, torch.tensor([[0.5, 0.625, 0.5, 0.25]]))
    assert example.pixels.shape == (3, 32, 32) and example.hard_pixels is not None
    (several,) = examples_of([Record("8", "mine", lambda: picture, ("a",), record.expressions[:1])], 32)
    assert several.boxes is not None and len(several.boxes) == 2
    assert several.hard_caption is None and several.hard_pixels is None


def test_a_record_without_negatives_gets_one_by_rule_always_the_same():
    picture = Image.new("RGB", (32, 32))
    plain = Record("9", "mine", lambda: picture, ("a red circle and a blue square",))
    first, again = (list(examples_of([plain], 32))[0] for _ in range(2))
    assert (first.hard_caption, first.rule) == ("a blue circle and a red square", "swap_attributes")
    assert (again.hard_caption, again.rule) == (first.hard_caption, first.rule)
    true_too = Record("10", "mine", lambda: picture, ("a red circle and a blue square", first.hard_caption))
    (other,) = examples_of([true_too], 32)
    assert other.hard_caption not in (None, *true_too.captions)
    assert other.rule != "swap_attributes"
    shown = Record("11", "mine", lambda: picture, plain.captions, negative_image=lambda: picture)
    (third,) = examples_of([shown], 32)
    assert third.hard_caption is None, "nothing says that it would be true of the negative picture"
    assert third.hard_pixels is not None


def test_noise_and_latents_do_not_depend_on_the_chunk_size(model: T2IModel) -> None:
    examples = list(examples_of(SceneRecords("val", 5, 32), 32))
    whole = next(iter(chunks(model.backbone, examples, 5, seed=3)))
    parts = list(chunks(model.backbone, examples, 2, seed=3))
    assert [len(part.examples) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    torch.testing.assert_close(torch.cat([part.latents for part in parts]), whole.latents, rtol=1e-4, atol=1e-5)
    assert len({float(noise.sum()) for noise in whole.noise}) == 5  # each its own
    other = next(iter(chunks(model.backbone, examples, 5, seed=4)))
    assert not torch.equal(other.noise, whole.noise)
