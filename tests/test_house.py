"""What stands around the package: metadata, example settings, docs."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from dpt_t2i import config as settings
from dpt_t2i.config import Section, build_config, leaves, resolve_key

ROOT = Path(__file__).parent.parent
CLASSES: dict[str, type[Section]] = {
    "demo": settings.DemoConfig,
    "probe": settings.ProbeConfig,
    "tune": settings.TuneConfig,
    "generate": settings.GenerateConfig,
    "score": settings.ScoreConfig,
    "alignment": settings.AlignmentConfig,
    "evaluate": settings.DiscriminationConfig,
    "inspect": settings.InspectConfig,
    "import-official": settings.ImportOfficialConfig,
    "export": settings.ExportConfig,
    "cache": settings.CacheConfig,
    "mine": settings.MineConfig,
    "perturb": settings.PerturbConfig,
    "images": settings.ImageScoresConfig,
    "doctor": settings.DoctorConfig,
    "app": settings.AppConfig,
}
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))  # beside them lies what the launcher reads
PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_names_paper_and_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PACKAGE["version"] and citation["license"] == "Apache-2.0"
    paper = citation["references"][0]
    assert paper["title"] == "Discriminative Probing and Tuning for Text-to-Image Generation"
    assert [author["family-names"] for author in paper["authors"]] == ["Qu", "Wang", "Li", "Zhang", "Nie", "Chua"]
    assert (paper["start"], paper["end"], paper["year"]) == (7434, 7444, 2024)


def test_the_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 the dpt-t2i authors" in text


def test_the_changelog_knows_the_version() -> None:
    assert PACKAGE["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned_for_the_tests() -> None:
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text().lower(), re.MULTILINE))
    extras = PACKAGE["optional-dependencies"]
    wanted = [*PACKAGE["dependencies"], *(line for name in ("dev", "app", "data", "faiss") for line in extras[name])]
    names = {re.split(r"[<>=]", line)[0].lower() for line in wanted}
    assert names <= pinned
    assert "torch==2.13.0\n" in (ROOT / "constraints.txt").read_text()  # no local part: any index has this wheel


def test_every_result_that_is_named_is_there() -> None:
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "src/dpt_t2i/bundled/README.md"]
    named = {name for path in texts for name in re.findall(r"benchmarks/results/[\w.]+\.json", path.read_text())}
    assert len(named) > 5
    assert not sorted(name for name in named if not (ROOT / name).is_file())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_example_config_builds_and_says_how_to_launch(path: Path) -> None:
    first, *rest = path.read_text().splitlines()
    launch = re.fullmatch(rf"# dpt (?:evaluate )?(\w+) --config configs/{path.parent.name}/{path.name}.*", first)
    assert launch is not None
    build_config(CLASSES[launch[1]], path)
    assert len(rest) < 40  # one screen


def paper_rows() -> list[tuple[str, str, str]]:
    """(command, key, value) of the settings table in docs/paper_index.md."""
    text = (ROOT / "docs" / "paper_index.md").read_text()
    return re.findall(r"^\| [^|]+ \| (\w+) \| `([\w.]+)` \| ([^|]+) \|", text, re.MULTILINE)


def test_the_paper_index_has_its_rows() -> None:
    assert len(paper_rows()) > 40


@pytest.mark.parametrize("command, key, value", paper_rows())
def test_the_paper_index_tells_the_truth(command: str, key: str, value: str) -> None:
    file = ROOT / "configs" / "sd21" / f"{command}.yaml"
    node: object = build_config(CLASSES[command], file if file.is_file() else None)
    for part in key.split("."):
        node = getattr(node, part)
    assert str(node) == value


def test_the_deviations_name_keys_that_exist() -> None:
    text = (ROOT / "docs" / "deviations.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 6]
    keys = {key for row in rows for key in re.findall(r"`([\w.]+)`", row.split("|")[5])}
    assert len(keys) >= 8
    known = {path for command in CLASSES.values() for path, _ in leaves(command)}
    assert keys <= known


def test_every_deviation_names_its_test() -> None:
    text = (ROOT / "docs" / "deviations.md").read_text()
    decided = re.findall(r"^\| ([^|]+) \|(?:[^|]+\|){4}$", text, re.MULTILINE)[1:]
    shown = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    assert len(decided) > 30
    assert set(decided) <= set(shown)
    named = [found for row in shown.values() for found in re.findall(r"`(\S+\.py)(?:::(\w+))?`", row)]
    assert len(named) > 30
    for file, test in named:
        assert test, f"{file}: name the test too"
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {test}"


@pytest.mark.parametrize("command", CLASSES)
def test_every_leaf_name_is_unique_within_a_command(command: str) -> None:
    names = [path.rpartition(".")[2] for path, _ in leaves(CLASSES[command])]
    assert len(names) == len(set(names))


def test_every_alias_points_to_a_leaf_and_hides_none() -> None:
    every = {path.rpartition(".")[2] for command in CLASSES.values() for path, _ in leaves(command)}
    assert set(settings.ALIASES.values()) <= every
    assert not set(settings.ALIASES) & every


def test_the_flags_in_the_docs_exist() -> None:
    text = "\n".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    lines = re.findall(r"^dpt (?:evaluate |data )?([a-z-]+)\b((?:.*\\\n)*.*)", text, re.MULTILINE)
    classes = CLASSES | dict.fromkeys(("itm", "rec"), CLASSES["evaluate"])
    used = [(command, line) for command, line in lines if command in classes]
    assert any("\\\n" in line for _, line in used), "lines that go on below are read to their end"
    assert {command for command, _ in used} == classes.keys() - {"demo", "evaluate"}
    for command, line in used:
        for flag in re.findall(r"--([a-z_0-9]+)", re.sub(r"#.*", "", line)):
            key = flag.removeprefix("no_")  # a switch, off
            assert flag in ("config", "json") or resolve_key(classes[command], key), f"dpt {command} --{flag}"


def test_no_switch_in_the_docs_is_given_a_word() -> None:
    """`--flag false` is refused by the command line: a switch is `--flag` or `--no_flag`."""
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    found = {page.name: re.findall(r"--\w+ (?:true|false)\b", page.read_text()) for page in pages}
    assert not any(found.values()), found


def test_every_setting_is_read_somewhere() -> None:
    # a flag that is parsed and never read is a promise that nobody keeps
    source = ROOT / "src" / "dpt_t2i"
    files = [path for path in source.rglob("*.py") if "config" not in path.parts and path.name != "cli.py"]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    names = {path.rpartition(".")[2] for command in CLASSES.values() for path, _ in leaves(command)}
    assert names <= read, sorted(names - read)
