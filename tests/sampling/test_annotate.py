"""What is drawn, and where."""

from PIL import Image

from dpt_t2i.pictures import PALETTE
from dpt_t2i.sampling.annotate import RIGHT, WRONG, Mark, annotate


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def test_a_small_picture_grows_by_whole_pixels() -> None:
    picture = Image.new("RGB", (2, 2))
    picture.putpixel((1, 0), (9, 200, 30))
    drawn = annotate(picture, [], side=64)
    assert drawn.size == (64, 64)
    assert drawn.getpixel((32, 31)) == (9, 200, 30) and drawn.getpixel((31, 31)) == (0, 0, 0)
    assert annotate(Image.new("RGB", (700, 300)), []).size == (700, 300)
    assert picture.size == (2, 2)


def test_boxes_are_drawn_at_their_edges_in_turn_of_colours() -> None:
    drawn = annotate(Image.new("RGB", (64, 64)), [Mark((8, 32, 24, 56), "a"), Mark((40, 32, 56, 56), "b")], side=512)
    for index, left in enumerate((8, 40)):
        assert drawn.getpixel((left * 8, 400)) == rgb(PALETTE[index])
        assert drawn.getpixel(((left + 16) * 8, 400)) == rgb(PALETTE[index])
        assert drawn.getpixel((left * 8 + 64, 400)) == (0, 0, 0)  # inside: nothing
    label = [drawn.getpixel((x, 32 * 8 - 8)) for x in range(8 * 8, 8 * 8 + 16)]
    assert rgb(PALETTE[0]) in label  # above the box


def test_boxes_and_labels_stay_on_the_picture() -> None:
    plain = annotate(Image.new("RGB", (64, 64)), [])
    drawn = annotate(
        Image.new("RGB", (64, 64)),
        [Mark((-20, -9, 90, 70), "a very long label, longer than it"), Mark((60, 60, 50, 50), "x")],
    )
    assert drawn.size == plain.size
    assert drawn.getpixel((0, 300)) == drawn.getpixel((511, 300)) == rgb(PALETTE[0])


def test_the_verdict_is_a_frame() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    assert annotate(picture, [], verdict=True).getpixel((0, 200)) == rgb(RIGHT)
    assert annotate(picture, [], verdict=False).getpixel((0, 200)) == rgb(WRONG)
    assert annotate(picture, []).getpixel((0, 200)) == (255, 255, 255)
