"""What a camera, a scanner and a phone write, as the upright 8-bit RGB that everybody sees."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpt_t2i.data.records import Record
from dpt_t2i.data.shards import decode
from dpt_t2i.errors import InputError
from dpt_t2i.pictures import as_rgb, read_picture, upright_size
from dpt_t2i.sampling.images import letterbox, open_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def phone(path: Path, orientation: int) -> Path:
    """8 wide, 4 high as stored: red on the left, blue on the right."""
    picture = Image.new("RGB", (8, 4), RED)
    picture.paste(BLUE, (4, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize(
    "orientation, size, corner",  # what shows at the upper left
    [(1, (8, 4), RED), (3, (8, 4), BLUE), (6, (4, 8), RED), (8, (4, 8), BLUE)],
)
def test_a_picture_is_turned_as_its_camera_was_held(tmp_path, orientation, size, corner):
    file = phone(tmp_path / "phone.png", orientation)
    record = Record("1", "mine", file, ("a",))
    for image in (record.load_image(), open_image(file), decode(file.read_bytes(), "phone.png")):
        assert image.size == size and image.getpixel((0, 0)) == corner
    assert record.image_size() == size, "told from the header alone"
    tiff = phone(tmp_path / "phone.tiff", orientation)
    assert read_picture(tiff, upright_size) == read_picture(tiff, as_rgb).size == size


def test_a_damaged_file_of_a_rare_format_is_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to decode image")  # what Pillow's AVIF says

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(InputError, match="cannot read image .*a.avif: Failed to decode image; replace or remove"):
        read_picture(tmp_path / "a.avif", as_rgb)


def test_boxes_in_a_picture_that_is_handed_over_are_in_its_own_pixels(tmp_path):
    with Image.open(phone(tmp_path / "phone.png", 6)) as lying:
        _, placement = letterbox(lying, 16, 16)
    assert (placement.scale, placement.left, placement.top) == (2.0, 0, 4), "as it lies: 8 x 4"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"scan.{suffix}")
    seen = np.asarray(open_image(tmp_path / f"scan.{suffix}"))
    assert seen.shape == (2, 3, 3)
    assert seen[..., 0].tolist() == [[0, 0, 1], [128, 254, 255]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_range_that_nobody_knows_is_refused(tmp_path, mode):
    Image.new(mode, (4, 4), 7).save(tmp_path / "depth.tif")
    with pytest.raises(InputError, match=rf"depth.tif: 32 bits a pixel \(mode {mode}\) have no known range"):
        open_image(tmp_path / "depth.tif")


def test_what_is_no_picture_is_named_without_an_address():
    with pytest.raises(InputError, match=r"^cannot read image shard/7.png: cannot identify its format; take another$"):
        read_picture(io.BytesIO(b"no picture"), as_rgb, "shard/7.png", "take another")


def test_an_upright_size_needs_no_pixels(tmp_path):
    file = phone(tmp_path / "phone.jpg", 5)
    file.write_bytes(file.read_bytes()[:-40])  # cut short: the header is whole
    assert read_picture(file, upright_size) == (4, 8)
