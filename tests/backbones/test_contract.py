"""Every family keeps the one contract; what only it has stands in its own file."""

from pathlib import Path

import pytest

from dpt_t2i.backbones.loading import load_backbone
from tests.backbones import contract
from tests.families import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "base")


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name_of)
def test_contract(check, folder: Path) -> None:
    check(load_backbone(folder, device="cpu"))


@pytest.mark.slow
def test_compiled(folder: Path) -> None:
    contract.compiled_gives_the_same_features(load_backbone(folder, device="cpu"))
