import pytest

from dpt_t2i.publish.privacy import public


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/home/me/models/base", "base"),
        ("~/models/base", "base"),
        ("../models/base", "base"),
        ("./run", "run"),
        ("runs/mine/tune", "tune"),
        ("C:\\Users\\me\\base", "base"),
        ("C:/Users/me/base", "base"),
        ("someone/some-model", "someone/some-model"),
        ("https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("bundled", "bundled"),
        ("a red circle", "a red circle"),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_only_paths_are_cut(given, kept):
    assert public(given) == kept


def test_it_goes_down_into_what_json_can_hold():
    given = {"model": {"lora": "/a/b"}, "files": ["/a/c", 1], "pair": ("~/d", True)}
    assert public(given) == {"model": {"lora": "b"}, "files": ["c", 1], "pair": ["d", True]}
