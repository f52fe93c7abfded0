"""Which of COCO's instances become expressions."""

import json

from PIL import Image

from dpt_t2i.data.coco import read_coco


def test_only_a_category_that_occurs_once_is_named_and_a_crowd_is_more_than_one(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "1.jpg")
    images = [{"id": 1, "file_name": "1.jpg", "width": 40, "height": 30}]
    names = {1: "dog", 2: "cup", 3: "person"}
    things = [(1, [2, 3, 10, 12], 0), (2, [0, 0, 5, 5], 0), (2, [9, 9, 5, 5], 0), (3, [0, 0, 40, 30], 1)]
    annotations = [
        {"id": i, "image_id": 1, "category_id": category, "bbox": box, "iscrowd": crowd}
        for i, (category, box, crowd) in enumerate(things)
    ]
    categories = [{"id": key, "name": name} for key, name in names.items()]
    captions = [{"id": 0, "image_id": 1, "caption": "a dog by two cups"}]
    files = [tmp_path / "captions.json", tmp_path / "instances.json"]
    files[0].write_text(json.dumps({"images": images, "annotations": captions}))
    files[1].write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    (record,) = read_coco(files, tmp_path)
    assert record.captions == ("a dog by two cups",)
    assert [(e.text, e.spans, e.boxes) for e in record.expressions] == [("the dog", ((4, 7),), ((2, 3, 10, 12),))]
