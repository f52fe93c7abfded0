"""MDETR's files beyond RefCOCO: Flickr30k writes its sizes as text, the mixed file holds two sources with equal ids."""

import pytest
from PIL import Image

from dpt_t2i.data.mdetr import pictures_of, read_mdetr
from dpt_t2i.errors import InputError
from tests.data.writers import write_json


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("COCO_train2014_000000000009.png", "9.png"):
        Image.new("RGB", (40, 30)).save(folder / name)
    return folder


def write(folder, rows):
    boxes = [{"image_id": r["id"], "id": i, "bbox": [1, 2, 10, 10], "tokens_positive": []} for i, r in enumerate(rows)]
    return write_json(folder / "final_mixed_train.json", {"images": rows, "annotations": boxes, "categories": []})


def test_pictures_of_two_sources_with_one_id_stay_two(tmp_path, images):
    sizes = {"height": 30, "width": 40}
    rows = [
        {
            "id": 0,
            "original_id": 9,
            "file_name": "COCO_train2014_000000000009.png",
            "caption": "a",
            "data_source": "coco",
        },
        {"id": 1, "original_id": 9, "file_name": "9.png", "caption": "b", "data_source": "vg"},
        {
            "id": 2,
            "original_id": 9,
            "file_name": "COCO_train2014_000000000009.png",
            "caption": "c",
            "data_source": "coco",
        },
    ]
    file = write(tmp_path, [row | sizes for row in rows])
    coco, genome = read_mdetr([file], images)
    assert (coco.captions, coco.image_id, coco.image.name) == (("a", "c"), "9", "COCO_train2014_000000000009.png")
    assert (genome.captions, genome.image_id, genome.image.name) == (("b",), "", "9.png")
    assert coco.id != genome.id and coco.picture != genome.picture and coco.boxes_of == (40, 30)
    assert pictures_of(file) == {"9"}


def test_flickr_writes_sizes_as_text_and_its_pictures_by_another_name(tmp_path, images):
    row = {"original_img_id": 36979, "file_name": "9.png", "height": "30", "width": "40"}
    file = write(tmp_path, [row | {"id": 0, "caption": "two men"}, row | {"id": 1, "caption": "a hat"}])
    (record,) = read_mdetr([file], images)
    assert (record.captions, record.id, record.image_id) == (("two men", "a hat"), "36979", "")
    assert [e.boxes for e in record.expressions] == [((1, 2, 10, 10),)] * 2
    with pytest.raises(InputError, match="`width` must be a whole number, not str"):
        list(read_mdetr([write(tmp_path, [row | {"id": 0, "caption": "x", "width": "forty"}])], images))
