import pytest
from PIL import Image

from dpt_t2i.errors import InputError
from dpt_t2i.scenes import commands
from dpt_t2i.scenes.commands import export_scenes, render_grid
from dpt_t2i.scenes.example import make_example
from dpt_t2i.scenes.render import render


def test_grid_shows_the_examples_in_order(tmp_path):
    result = render_grid(10, tmp_path / "new" / "grid.png", seed=3, size=32)
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.size == (8 * 34 - 2, 2 * 34 - 2)
        ninth = grid.crop((34, 34, 66, 66))  # second row, second column
        assert ninth.tobytes() == render(make_example(9, seed=3).scene, 32).tobytes()
    assert result["captions"][9] == make_example(9, seed=3).caption.text


def test_export_writes_every_example(tmp_path):
    export_scenes(tmp_path, n=3, size=48)
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 3
    assert (
        Image.open(tmp_path / "000002.png").size == Image.open(tmp_path / "negatives" / "000002.png").size == (48, 48)
    )


@pytest.mark.parametrize("name", ["grid.foo", "grid"])
def test_a_picture_of_no_format_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="no picture format is called .*; give a .png"):
        render_grid(1, tmp_path / name)


@pytest.mark.parametrize(("n", "size"), [(0, 64), (1, 4)])
def test_nonsense_is_refused(tmp_path, n, size):
    with pytest.raises(InputError, match="at least"):
        render_grid(n, tmp_path / "x.png", size=size)
    with pytest.raises(InputError, match="at least"):
        export_scenes(tmp_path, n=n, size=size)


def test_an_export_that_was_stopped_begins_anew(tmp_path, monkeypatch):
    drawn = []

    def stop(*given):
        drawn.append(given)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return render(*given)

    monkeypatch.setattr(commands, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        export_scenes(tmp_path / "out", n=3)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [".partial"]
    export_scenes(tmp_path / "out", n=3)
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir() if entry.suffix != ".png") == [
        "metadata.jsonl",
        "negatives",
    ]


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and its metadata would be replaced; give a new folder"):
        export_scenes(tmp_path, n=3)
    assert (tmp_path / "metadata.jsonl").read_text() == "mine"
