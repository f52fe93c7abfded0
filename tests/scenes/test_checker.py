"""The checker against drawn truth, and against what is no scene at all."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile
from scipy import ndimage

from dpt_t2i.errors import InputError
from dpt_t2i.scenes.checker import check, detect, name_color
from dpt_t2i.scenes.example import make_example, true_of
from dpt_t2i.scenes.facts import Fact, Phrase, judge, seen_in
from dpt_t2i.scenes.layout import draw_background, draw_shade
from dpt_t2i.scenes.render import render
from dpt_t2i.scenes.world import COLORS, SHAPES, Background, Scene, SceneObject

FLAT = Background("flat", (150, 150, 150), (150, 150, 150), 0.0, 0)
SEED = 41


def as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def softened(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blur, noise, and a change of size and back: about what a small autoencoder does."""
    blurred = ndimage.gaussian_filter(np.asarray(image, dtype=np.float32), (0.7, 0.7, 0))
    noisy = as_image(blurred + rng.normal(0, 3, blurred.shape))
    return noisy.resize((48, 48), Image.Resampling.BILINEAR).resize((64, 64), Image.Resampling.BICUBIC)


def names(seen) -> list[tuple]:
    return sorted((str(s.shape), str(s.color), str(s.size)) for s in seen)


@pytest.mark.parametrize("size", [48, 64, 96, 128, 256])
def test_renders_are_read_as_drawn(size):
    for index in range(60):
        example = make_example(index, seed=SEED, split="val")
        for scene in (example.scene, example.negative.scene):
            seen = detect(render(scene, size))
            assert names(seen) == names(seen_in(scene))
            for facts in (example.caption.facts, example.negative.caption.facts):
                assert judge(facts, seen).correct == true_of(facts, scene)


def test_softened_renders_are_read_as_drawn():
    rng = np.random.default_rng(0)
    right = []
    for index in range(150):
        example = make_example(index, seed=SEED + 1, split="val")
        seen = detect(softened(render(example.scene), rng))
        for facts in (example.caption.facts, example.negative.caption.facts):
            right.append(judge(facts, seen).correct == true_of(facts, example.scene))
    assert np.mean(right) >= 0.99


def test_coarse_grain_hides_nothing():
    rng = np.random.default_rng(0)
    for index in range(40):
        scene = make_example(index, seed=SEED, split="val").scene
        grainy = np.asarray(render(scene), dtype=np.float32) + rng.normal(0, 10, (64, 64, 3))
        assert names(detect(as_image(grainy))) == names(seen_in(scene))


def test_held_out_compositions_are_read_too():
    for index in range(60):
        example = make_example(index, seed=SEED, split="heldout")
        assert check(render(example.scene), example.caption.facts).correct
        assert not check(render(example.scene), example.negative.caption.facts).correct


def test_boxes_lie_on_their_objects():
    for index in range(60):
        scene = make_example(index, seed=SEED, split="val").scene
        for size in (64, 128):
            for seen in detect(render(scene, size)):
                distances = [np.abs(np.subtract(seen.box, thing.box)).max() for thing in scene.objects]
                assert min(distances) < 0.012  # under one pixel at 64


def test_touching_things_of_two_colours_stay_two():
    rng = np.random.default_rng(0)
    for _ in range(40):
        colors, shapes = rng.permutation(list(COLORS))[:2].tolist(), rng.choice(SHAPES, 2).tolist()
        a, b = (
            SceneObject(s, c, "large", 0.3, 0.5, 0.36, 5.0, draw_shade(c, rng))
            for s, c in zip(shapes, colors, strict=True)
        )
        b = replace(b, cx=b.cx + a.box[2] - b.box[0])
        seen = detect(softened(render(Scene((a, b), draw_background(rng))), rng))
        assert sorted((s.shape, s.color) for s in seen) == sorted(zip(shapes, colors, strict=True))


def test_what_is_no_scene_has_no_things():
    rng = np.random.default_rng(0)
    clouds = ndimage.gaussian_filter(rng.normal(size=(64, 64, 3)), (4, 4, 0))
    blanks = [Image.new("RGB", (64, 64), tone) for tone in ("black", "white", "red", "yellow", "#969696", "#402080")]
    noise = [as_image(rng.uniform(0, 255, (64, 64, 3))), as_image(rng.normal(150, 30, (64, 64, 3)))]
    for image in (*blanks, *noise, as_image(150 + 60 * clouds / clouds.std())):
        assert [s for s in detect(image) if s.shape] == []


def test_blends_satisfy_neither_prompt():
    for index in range(0, 120, 2):
        one, other = (make_example(i, seed=SEED, split="val") for i in (index, index + 1))
        seen = detect(Image.blend(render(one.scene), render(other.scene), 0.5))
        assert not judge(one.caption.facts, seen).correct, one.caption.text
        assert not judge(other.caption.facts, seen).correct, other.caption.text


def drawing(points: list[tuple[float, float]], fill=COLORS["red"]) -> Image.Image:
    """One polygon, in fractions of the side, on a flat ground."""
    image = Image.new("RGB", (512, 512), FLAT.first)
    ImageDraw.Draw(image).polygon([(512 * x, 512 * y) for x, y in points], fill=fill)
    return image.resize((64, 64), Image.Resampling.BOX)


@pytest.mark.parametrize(
    "points",
    [
        [(0.3, 0.4), (0.7, 0.4), (0.7, 0.6), (0.3, 0.6)],  # an oblong
        [(0.5, 0.3), (0.7, 0.5), (0.5, 0.7), (0.3, 0.5)],  # a square on its corner
        [(0.3, 0.35), (0.7, 0.35), (0.5, 0.7)],  # a triangle on its head
        [(0.3, 0.3), (0.42, 0.3), (0.42, 0.58), (0.7, 0.58), (0.7, 0.7), (0.3, 0.7)],  # an L
    ],
)
def test_other_shapes_are_seen_but_not_named(points):
    (seen,) = detect(drawing(points))
    assert seen.shape is None and seen.color == "red"
    assert not check(drawing(points), [Fact("exists", Phrase("square"))]).correct
    assert judge([], [seen]).extra_objects == 1


def test_a_thing_in_a_foreign_colour_is_seen_but_not_named():
    square = [(0.35, 0.35), (0.65, 0.35), (0.65, 0.65), (0.35, 0.65)]
    assert detect(drawing(square))[0].shape == "square"
    (faded,) = detect(drawing(square, fill=(190, 90, 90)))
    (magenta,) = detect(drawing(square, fill=(230, 30, 160)))
    assert (faded.shape, faded.color) == (magenta.shape, magenta.color) == (None, None)


def test_slivers_and_specks_are_no_things():
    assert detect(drawing([(0.1, 0.5), (0.9, 0.5), (0.9, 0.52), (0.1, 0.52)])) == []
    assert detect(drawing([(0.5, 0.5), (0.55, 0.5), (0.55, 0.55), (0.5, 0.55)])) == []


def test_things_far_too_large_or_small_have_no_shape():
    for half in (0.05, 0.35):
        square = [
            (0.5 - half, 0.5 - half),
            (0.5 + half, 0.5 - half),
            (0.5 + half, 0.5 + half),
            (0.5 - half, 0.5 + half),
        ]
        assert [s.shape for s in detect(drawing(square))] == [None]


@pytest.mark.parametrize("color", COLORS)
def test_every_shade_has_its_name_on_every_ground(color):
    rng = np.random.default_rng(0)
    for _ in range(100):
        shade = 0.975 * np.array(draw_shade(color, rng), dtype=np.float32)
        ground = np.array(draw_background(rng).first, dtype=np.float32)
        assert name_color(shade, ground) == color
        assert name_color((shade + ground) / 2, ground) is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_modes_with_colour(mode):
    scene = Scene((SceneObject("circle", "red", "large", 0.4, 0.6, 0.36, 0.0, COLORS["red"]),), FLAT)
    (seen,) = detect(render(scene).convert(mode))
    assert (seen.shape, seen.color, seen.size) == ("circle", "red", "large")


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I", "F"])
def test_modes_without_colour_never_crash(mode):
    scene = Scene((SceneObject("circle", "white", "large", 0.4, 0.6, 0.36, 0.0, COLORS["white"]),), FLAT)
    seen = detect(render(scene).convert(mode))
    assert mode == "1" or [(s.shape, s.color) for s in seen] == [("circle", "white")]


def test_the_smallest_image():
    scene = Scene((SceneObject("square", "blue", "large", 0.5, 0.5, 0.36, 0.0, COLORS["blue"]),), FLAT)
    assert names(detect(render(scene, 32))) == [("square", "blue", "large")]


@pytest.mark.parametrize("size", [(31, 31), (1, 1), (64, 48)])
def test_images_that_are_too_small_or_not_square_are_refused(size):
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]}"):
        detect(Image.new("RGB", size))


def test_a_broken_file_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    buffer = BytesIO()
    as_image(np.random.default_rng(0).uniform(0, 255, (64, 64, 3))).save(buffer, "PNG")
    broken = Image.open(BytesIO(buffer.getvalue()[:4000]))
    with pytest.raises(InputError, match="cannot be read"):
        detect(broken)


def test_a_verdict_tells_fact_by_fact():
    circle = SceneObject("circle", "red", "small", 0.2, 0.5, 0.26, 0.0, COLORS["red"])
    square = SceneObject("square", "blue", "large", 0.7, 0.5, 0.36, 0.0, COLORS["blue"])
    image = render(Scene((circle, square), FLAT))
    left = Fact("relation", Phrase("circle"), relation="left", other=Phrase("square", "blue"))
    three = Fact("count", Phrase("circle"), count=3)
    verdict = check(image, [Fact("exists", Phrase("circle", "red", "small")), left, three])
    assert [ok for _, ok in verdict.facts] == [True, True, False] and not verdict.correct
    assert [s.color for s in verdict.seen] == ["blue", "red"]  # largest first
