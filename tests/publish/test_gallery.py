"""Images with verdicts and boxes, from the files of an evaluation."""

import base64
import io
import shutil
from pathlib import Path

from PIL import Image, PngImagePlugin

from dpt_t2i.publish.gallery import ArmFolder, Piece, data_uri, line_of, read_rows


def test_a_line_joins_what_the_arms_have(arms_folder: Path) -> None:
    arms = {name: ArmFolder.read(arms_folder / name) for name in ("base", "dpt", "nobody")}
    line = line_of(arms, 4, 0)
    assert line is not None and line.category == "two_objects" and line.seed == 0
    assert line.pieces == (
        Piece("a "), Piece("red circle", 1), Piece(" and a <b>"), Piece("star", 2), Piece("</b>"),
    )  # fmt: skip
    base, dpt = line.shots["base"], line.shots["dpt"]
    assert line.shots["nobody"] is None and base is not None and dpt is not None
    assert base.boxes == () and [(b.left, b.width, b.color) for b in dpt.boxes] == [(8, 16, 1), (40, 20, 2)]
    assert (base.score, dpt.score, dpt.correct, dpt.failures) == (None, 0.25, True, ())
    assert line_of(arms, 5, 0) is None


def test_a_missing_picture_is_a_gap(arms_folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(arms_folder / "base", tmp_path / "base"))
    (copied / "images" / "00004_0.png").unlink()
    line = line_of({"base": ArmFolder.read(copied)}, 4, 0)
    assert line is not None and line.shots["base"] is None


def test_an_embedded_image_is_small_and_carries_no_text() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "/a/private/path")
    buffer = io.BytesIO()
    Image.new("RGB", (700, 350), "red").save(buffer, format="PNG", pnginfo=info)
    uri = data_uri(Image.open(io.BytesIO(buffer.getvalue())))
    raw = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    embedded = Image.open(io.BytesIO(raw))
    assert embedded.size == (256, 128) and embedded.getpixel((5, 5)) == (255, 0, 0)
    assert embedded.info == {} and b"private" not in raw


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": ')
    assert read_rows(tmp_path / "a.jsonl") == [{"a": 1}]
    assert read_rows(tmp_path / "none.jsonl") == []
