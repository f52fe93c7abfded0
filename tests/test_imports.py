"""Imports go one way through the house."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "dpt_t2i"
FILES = sorted(SOURCE.rglob("*.py"))

# room -> the rooms of ours that it may import; `adapter.types` and the like stand for that one file.
# `errors`, `files` and `versions` are open to all. `bundled` holds data, no code.
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "versions": set(),
    "config": set(),
    "boxes": set(),
    "pictures": set(),
    "scenes": {"boxes"},
    "data": {"config", "boxes", "pictures", "scenes"},
    "backbones": {"config"},
    "adapter": {"config", "boxes", "backbones.types", "backbones.fingerprint"},
    "objectives": {"boxes", "adapter.types"},
    "sampling": {"config", "boxes", "pictures", "backbones", "adapter"},
    "evaluation": {"config", "boxes", "scenes", "data", "backbones", "adapter", "sampling"},
    "training": {"config", "boxes", "scenes", "data", "backbones", "adapter", "objectives", "sampling", "evaluation"},
    "publish": {"config", "backbones", "sampling"},
}
ENTRANCES = {
    "cli",
    "__main__",
    "__init__",
    "doctor",
    "demo",
    "report",
}  # they stand outside the rooms and may import any but `cli`


def room_of(path: Path) -> str:
    """`adapter` for src/dpt_t2i/adapter/score.py, `config` for src/dpt_t2i/config.py."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def modules(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "dpt_t2i":
                yield from (f"dpt_t2i.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """`config`, `adapter.types`, ...: what a file imports of this package, below `dpt_t2i.`."""
    return {name.removeprefix("dpt_t2i.") for name in modules(path) if name.startswith("dpt_t2i.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_left(path: Path) -> None:
    room = room_of(path)
    if room in ENTRANCES:
        return
    assert room in MAY_IMPORT, f"{room} has no row in MAY_IMPORT"
    allowed = MAY_IMPORT[room] | {"errors", "files", "versions", room}
    wrong = {name for name in ours(path) if not {name, name.split(".")[0]} & allowed}
    assert not wrong, f"{path.name} of {room} must not import {sorted(wrong)}"


def test_nothing_imports_the_command_line() -> None:
    importers = {path.name for path in FILES if "cli" in ours(path) and path.name != "__main__.py"}
    assert not importers


def test_only_the_app_imports_gradio() -> None:
    importers = {
        str(path.relative_to(SOURCE)) for path in FILES if any(name.split(".")[0] == "gradio" for name in modules(path))
    }
    assert importers <= {"publish/app.py"}


def test_the_walk_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("def f():\n    from dpt_t2i import training\n    import dpt_t2i.adapter.score\n")
    assert ours(file) == {"training", "adapter.score"}


@pytest.mark.parametrize("module", ["dpt_t2i", "dpt_t2i.config", "dpt_t2i.cli"])
def test_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(' '.join({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"{module} imports {done.stderr}"
