"""The atlas: its buckets, its figures by another way, and its losses by hand."""

import math
from dataclasses import replace

import pytest

from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.atlas import Bucket, TapReaders, atlas_cells, best_cells, buckets, tap_ranks, tap_scores
from dpt_t2i.evaluation.examples import HeldOut
from dpt_t2i.evaluation.itm import ItmScores, itm_scores
from dpt_t2i.evaluation.rec import RecRanks, rec_ranks
from dpt_t2i.sampling.scoring import MatchScorer
from tests.tiny import tiny_adapter, tiny_backbone


def test_buckets_share_out_the_timesteps():
    assert buckets(0, 999, 4) == (
        Bucket(0, 249, 125),
        Bucket(250, 499, 375),
        Bucket(500, 749, 625),
        Bucket(750, 999, 875),
    )
    parts = buckets(100, 109, 3)
    assert [(part.low, part.high) for part in parts] == [(100, 102), (103, 105), (106, 109)]
    assert all(part.low <= part.middle <= part.high for part in (*parts, *buckets(7, 8, 2)))
    with pytest.raises(InputError, match="timestep_buckets 11: there are 10 timesteps from 100 to 109; give fewer"):
        buckets(100, 109, 11)


def test_each_tap_says_what_it_says_alone():
    """One pass for all taps, against the evaluation of a single adapter."""
    backbone = tiny_backbone()
    records = SceneRecords("val", 5, 32)[:]
    records[1] = replace(records[1], negatives=(), negative_image=None)
    records[2] = replace(records[2], expressions=())
    part = HeldOut(records, 32, range(1, 5))
    adapters = {name: tiny_adapter(backbone, name, seed=3) for name in ("bottom0", "up1")}
    readers = TapReaders(backbone, backbone.parse_taps("bottom0_up1"), adapters)
    scores = list(tap_scores(readers, part, [125, 875], batch_size=3))
    ranks = list(tap_ranks(readers, part, [125, 875], batch_size=3))
    for name, adapter in adapters.items():
        alone = MatchScorer(backbone, adapter, backbone.parse_taps(name))
        want = itm_scores(alone, part, [125, 875], batch_size=4, first=part.first)
        got = [row for tap, row in scores if tap == name]
        assert {(row.id, row.timestep): row.positive for row in got} == pytest.approx(
            {(row.id, row.timestep): row.positive for row in want}, abs=1e-5
        )
        assert [row.wrong_image is None for row in got] == [row.id.endswith("1") for row in got]
        placed = rec_ranks(alone, part, [125, 875], batch_size=4, first=part.first_grounded)
        key = lambda row: (row.id, row.timestep)  # noqa: E731
        assert sorted(((*key(r), r.iou_rank) for tap, r in ranks if tap == name), key=str) == sorted(
            ((*key(r), r.iou_rank) for r in placed), key=str
        )


def test_cells_and_losses_by_hand():
    rows = [
        ItmScores("a", "swap", 125, 0.5, 0.3, None),
        ItmScores("b", "swap", 125, 0.5, 0.6, None),
        ItmScores("a", "swap", 875, 0.5, 0.5, None),
    ]
    ranks = [RecRanks("a", 125, 0, None, 0.75), RecRanks("b", 125, 3, None, -0.25)]
    cells = atlas_cells([("mid", row) for row in rows], [("mid", row) for row in ranks], {"mid": 10.0})
    early, late = cells["mid"]["125"], cells["mid"]["875"]
    assert (early["itm_text"]["accuracy"], early["itm_text"]["count"]) == (0.5, 2)
    # Margins 0.2 and -0.1, times 10.
    want = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(1.0))) / 2
    assert early["loss_i2t"] == pytest.approx(want)
    assert early["rec_p1"]["accuracy"] == 0.5 and early["rec_p5"]["accuracy"] == 1.0
    assert early["loss_giou"] == pytest.approx(0.75)
    assert late["itm_text"]["accuracy"] == 0.0, "a tie is never right"
    assert late["loss_i2t"] == pytest.approx(math.log(2.0))
    assert "itm_image" not in early and "loss_t2i" not in early and "rec_p1" not in late
    assert best_cells(cells) == {
        "itm_text": {"tap": "mid", "timestep": 125, "accuracy": 0.5},
        "rec_p1": {"tap": "mid", "timestep": 125, "accuracy": 0.5},
    }


def test_a_sure_mistake_has_a_finite_loss():
    cells = atlas_cells([("mid", ItmScores("a", "r", 1, -1.0, 1.0, 1.0))], [], {"mid": 1e4})
    assert cells["mid"]["1"]["loss_i2t"] == pytest.approx(2e4)
