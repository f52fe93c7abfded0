"""docs/migrating.md against the flags that there are."""

import re
from pathlib import Path

import pytest

from dpt_t2i.config import GenerateConfig, ProbeConfig, Section, TuneConfig, leaves, resolve_key
from tests.e2e import test_seed_commands as seed

COMMANDS: dict[str, type[Section]] = {"probe": ProbeConfig, "tune": TuneConfig, "generate": GenerateConfig}
TEXT = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`[^|]+) \| (probe|tune|generate) \| (`[^|]+) \| [^|]+ \|$", TEXT, re.MULTILINE)


def flags(cell: str) -> list[str]:
    return re.findall(r"--(\w+)", cell)


def test_the_tables_have_their_rows() -> None:
    assert len(ROWS) > 55


@pytest.mark.parametrize("command, ours", [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_flag_of_ours_exists(command: str, ours: str) -> None:
    assert flags(ours)
    for flag in flags(ours):
        assert resolve_key(COMMANDS[command], flag.removeprefix("no_"))


def test_two_names_in_one_cell_are_one_setting() -> None:
    for _, command, ours in ROWS:
        if " or " in ours:
            assert len({resolve_key(COMMANDS[command], flag) for flag in flags(ours)}) == 1, ours


@pytest.mark.parametrize("line", [seed.STAGE1, seed.STAGE2, seed.TEXT_TO_IMAGE])
def test_every_flag_of_the_page_has_a_row_under_its_own_name(line: str) -> None:
    rows = {flag: ours for released, _, ours in ROWS for flag in flags(released)}
    for flag in flags(" ".join(seed.flags(line))):
        assert flag in flags(rows[flag]), flag


def test_what_is_left_out_is_really_not_there() -> None:
    section = TEXT.partition("## Left out")[2].partition("\n## ")[0]
    known = {path.rpartition(".")[2] for command in COMMANDS.values() for path, _ in leaves(command)}
    left = flags(section)
    assert len(left) > 30 and not known & set(left)
