"""`dpt probe --taps`: many adapters in one run, each as if it were alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.config import ATLAS_ADAPTER, ProbeConfig, build_config
from dpt_t2i.errors import InputError
from dpt_t2i.report import probe
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.trackers import read_metrics
from tests.families import save_pixart_sigma
from tests.training import forked
from tests.training.conftest import SMALL

PLAIN = {"timestep_buckets": 2, "max_map_size": 2, "max_grad_norm": 0.05, "on_policy_fraction": 0.0}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    want, got = weights(one), weights(other)
    assert want.keys() == got.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def atlas_run(base, tmp_path_factory):
    """Two steps on two taps, through the command's own function."""
    folder = tmp_path_factory.mktemp("atlas")
    given = {"pretrained_model_name_or_path": str(base), "taps": "mid_up2", "output_dir": str(folder)}
    config = build_config(ProbeConfig, overrides=SMALL | PLAIN | given)
    return config, probe(config)


def test_each_adapter_learns_as_it_would_alone(atlas_run, probe_config, tmp_path):
    """The same start, examples, noise and steps, and a gradient clipped by its own norm: it is clipped at each step."""
    config, _ = atlas_run
    for tap in ("mid", "up2"):
        run_probe(probe_config(tap=tap, output_dir=str(tmp_path / tap), max_map_size=2, max_grad_norm=0.05))
        assert_same_weights(config.folder / "adapters" / tap, tmp_path / tap / "adapter")
    (row,) = [row for row in read_metrics(config.folder / "metrics.jsonl") if row["split"] == "train"]
    assert row["grad_norm"] > 2 * 0.05


def test_the_run_leaves_numbers_and_a_page(atlas_run):
    config, result = atlas_run
    atlas = json.loads((config.folder / "atlas.json").read_text())
    assert atlas == json.loads(json.dumps(result["atlas"]))
    assert list(atlas["taps"]) == list(atlas["cells"]) == ["mid", "up2"]
    assert [bucket["middle"] for bucket in atlas["buckets"]] == [250, 750]
    for row in atlas["cells"].values():
        assert list(row) == ["250", "750"]
        assert {"itm_text", "itm_image", "rec_p1", "loss_i2t", "loss_t2i", "loss_giou"} <= row["250"].keys()
    last = [row for row in read_metrics(config.folder / "metrics.jsonl") if row["split"] == "val"][-1]
    assert last["itm_text"] == pytest.approx((last["itm_text_mid"] + last["itm_text_up2"]) / 2)
    shown = "\n".join(result["summary"])
    assert "ITM, text side    250    750" in shown and "best REC, P@1:" in shown
    page = (config.folder / "report.html").read_text()
    assert "What does each tap understand" in page and "http" not in page.replace("http-equiv", "")
    assert (config.folder / "atlas.png").read_bytes().startswith(b"\x89PNG")


def test_it_goes_on_from_a_checkpoint(atlas_run, base, tmp_path):
    config, _ = atlas_run
    given = {"pretrained_model_name_or_path": str(base), "taps": "mid_up2", "output_dir": str(tmp_path)}
    run_probe(build_config(ProbeConfig, overrides=SMALL | PLAIN | given | {"max_train_steps": 1}))
    onward = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    again = build_config(ProbeConfig, tmp_path / "config.yaml", onward)
    assert again.atlas.taps == again.model.tap == "mid_up2"
    result = run_probe(again)
    assert result["atlas"]["cells"] == atlas_cells_of(config)
    for tap in ("mid", "up2"):
        want, got = weights(config.folder / "adapters" / tap), weights(tmp_path / "adapters" / tap)
        assert all(torch.equal(got[name], value) for name, value in want.items())


def atlas_cells_of(config: ProbeConfig):
    return json.loads((config.folder / "atlas.json").read_text())["cells"]


@pytest.mark.slow
def test_two_processes_make_the_same_atlas(atlas_run, base, tmp_path):
    config, _ = atlas_run
    given = {"pretrained_model_name_or_path": str(base), "taps": "mid_up2", "output_dir": str(tmp_path / "run")}
    halved = build_config(ProbeConfig, overrides=SMALL | PLAIN | given | {"train_batch_size": 1})
    forked.run(lambda: run_probe(halved), tmp_path / "logs", world=2)
    for tap in ("mid", "up2"):
        want, got = weights(config.folder / "adapters" / tap), weights(tmp_path / "run" / "adapters" / tap)
        far = {name: float((got[name] - value).abs().max()) for name, value in want.items()}
        assert max(far.values()) < 0.1 * SMALL["learning_rate"], max(far, key=lambda name: far[name])
    for tap, row in atlas_cells_of(halved).items():
        for timestep, cell in row.items():
            one = atlas_cells_of(config)[tap][timestep]
            assert cell.keys() == one.keys() and cell["itm_text"]["count"] == one["itm_text"]["count"]
            assert cell["loss_i2t"] == pytest.approx(one["loss_i2t"], abs=1e-2)


def test_a_transformers_blocks_all_at_once(tmp_path):
    base = save_pixart_sigma(tmp_path / "base")
    given = {"pretrained_model_name_or_path": str(base), "taps": "all", "output_dir": str(tmp_path / "run")}
    result = run_probe(build_config(ProbeConfig, overrides=SMALL | PLAIN | given | {"max_train_steps": 1}))
    assert list(result["atlas"]["cells"]) == list(load_backbone(base, device="cpu").taps)
    first, *others = (weights(tmp_path / "run" / "adapters" / tap) for tap in result["atlas"]["taps"])
    assert others and all(not torch.equal(one["queries.weight"], first["queries.weight"]) for one in others)


def test_the_adapters_are_small_unless_the_config_says_otherwise():
    config = build_config(ProbeConfig, overrides={"taps": "all", "hidden_dim": 32})
    assert config.adapter == ATLAS_ADAPTER.model_copy(update={"hidden_dim": 32})
    assert (config.model.tap, config.adapter.num_queries_matching + config.adapter.num_queries_rec) == ("all", 30)
    assert build_config(ProbeConfig, overrides={"taps": "none"}) == ProbeConfig()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"taps": "mid_up9"}, "unknown tap `up9`; did you mean `up"),
        ({"taps": "mid_mid"}, "names a block twice"),
        ({"taps": "all-40-4"}, "taps `all-40-4` fuses its blocks into one map; name them without sizes"),
        ({"taps": "mid", "adapter": "runs/probe"}, "taps gives each tap a fresh adapter; leave adapter out"),
        ({"taps": "mid", "timestep_buckets": 1001}, "timestep_buckets 1001: there are 1000 timesteps from 0 to 999"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(probe_config, given, said):
    with pytest.raises(InputError, match=said):
        run_probe(probe_config(**given))


def test_tap_and_taps_do_not_go_together():
    with pytest.raises(InputError, match="^tap `up1` and taps `all` do not go together: give tap for one adapter"):
        build_config(ProbeConfig, overrides={"tap": "up1", "taps": "all"})
