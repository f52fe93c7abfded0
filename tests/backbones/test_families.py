"""Every family keeps the same contract."""

from pathlib import Path

import pytest

from dpt_t2i.backbones.loading import load_backbone
from tests.backbones import contract
from tests.families import FAMILIES

DONE = ("sd2_v",)


@pytest.fixture(scope="module", params=DONE)
def folder(request, tmp_path_factory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("families") / request.param)


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name_of)
def test_contract(check, folder):
    check(load_backbone(folder, device="cpu"))
