"""Images of a record: from a file or a function, always RGB; a file that cannot be read is named."""

from pathlib import Path

import pytest
from PIL import Image

from dpt_t2i.data.index import RecordIndex
from dpt_t2i.data.records import ImageSource, Record, check_inside
from dpt_t2i.errors import InputError


def record(image: ImageSource, negative: ImageSource | None = None) -> Record:
    return Record(id="1", source="toy", image=image, captions=("x",), negative_image=negative)


def painted(path: Path, mode: str, color: int | tuple[int, ...]) -> Path:
    Image.new(mode, (3, 2), color).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 40), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_a_file_of_any_mode_is_read_as_rgb(tmp_path, mode, color, rgb):
    image = record(painted(tmp_path / "a.png", mode, color)).load_image()
    assert (image.mode, image.size, image.getpixel((2, 1))) == ("RGB", (3, 2), rgb)


def test_a_function_is_called_when_the_image_is_wanted():
    calls = []

    def draw() -> Image.Image:
        calls.append(1)
        return Image.new("RGB", (5, 5), (1, 2, 3))

    drawn = record(draw)
    assert not calls
    assert drawn.load_image().getpixel((0, 0)) == (1, 2, 3)
    assert len(calls) == 1


def test_the_negative_image_is_its_own(tmp_path):
    own, other = painted(tmp_path / "a.png", "L", 10), painted(tmp_path / "b.png", "L", 200)
    both = record(own, other)
    negative = both.load_negative_image()
    assert both.load_image().getpixel((0, 0)) == (10, 10, 10)
    assert negative is not None and negative.getpixel((0, 0)) == (200, 200, 200)
    assert record(own).load_negative_image() is None


@pytest.mark.parametrize("damage", ["gone", "text", "cut", "folder"])
def test_an_unreadable_file_is_named(tmp_path, damage):
    path = tmp_path / "broken.png"
    if damage == "text":
        path.write_text("no picture")
    elif damage == "cut":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "folder":
        path.mkdir()
    good = painted(tmp_path / "good.png", "L", 0)
    for load in (record(path).load_image, record(good, path).load_negative_image):
        with pytest.raises(InputError, match=r"cannot read image .*broken\.png: .*; replace or remove the file"):
            load()


def test_boxes_of_an_image_of_another_size_are_refused(tmp_path):
    path = painted(tmp_path / "a.png", "RGB", (1, 2, 3))  # 3 x 2
    one = Record("1", "toy", path, ("x",), boxes_of=(2, 3))
    one.require_inside((), (3, 2))
    with pytest.raises(InputError, match=r"toy/1: its boxes were drawn in an image of 2 x 3 .* the file has 3 x 2"):
        one.require_inside([(0, 0, 1, 1)], (3, 2))
    assert RecordIndex([one])[0] == one


@pytest.mark.parametrize("box", [(3, 0, 1, 1), (0, 2, 1, 1), (-0.5, 0, 0.5, 1)])
def test_a_box_of_which_nothing_lies_inside_is_refused(box):
    with pytest.raises(ValueError, match="lies outside the image of 3 x 2"):
        check_inside([box], (3, 2))


@pytest.mark.parametrize(
    ("image", "image_id", "says"),
    [
        (Path("x/COCO_train2014_000000000009.jpg"), "", "9"),
        (Path("x/000000000009.jpg"), "", "9"),
        (Path("x/000000000009.jpg"), "7", "7"),
        (Path("x/cat.jpg"), "", ""),
    ],
)
def test_the_id_in_coco_is_as_told_or_as_the_name_looks(image, image_id, says):
    assert Record("1", "toy", image, ("x",), image_id=image_id).coco_id == says


def test_twelve_digits_alone_make_no_two_files_one_picture():
    one, other = (Record("1", "toy", Path(folder) / "000000000001.jpg", ("x",)) for folder in ("clip1", "clip2"))
    assert one.picture != other.picture and one.coco_id == other.coco_id
