"""The whole loop through `run_demo`, on a tiny base that ships its own (random) artifacts."""

import pytest

from dpt_t2i import demo
from dpt_t2i.config import DemoConfig, ProbeConfig, TuneConfig, build_config
from dpt_t2i.demo import _clear, run_demo
from dpt_t2i.errors import InputError, Stopped
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.tune import run_tune
from tests.tiny import tiny_pipeline
from tests.training.conftest import SMALL


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    common = SMALL | {"pretrained_model_name_or_path": str(folder), "max_train_steps": 1}
    shipped = folder / "dpt"
    run_probe(build_config(ProbeConfig, overrides=common | {"output_dir": shipped / "probe"}))
    tuned = {"output_dir": shipped / "tuned", "adapter": str(shipped / "probe" / "adapter")}
    run_tune(build_config(TuneConfig, overrides=common | tuned))
    return folder


def test_the_loop_ends_with_a_report(base, tmp_path):
    config = build_config(
        DemoConfig,
        overrides={
            "pretrained_model_name_or_path": str(base),
            "probe_steps": 1,
            "tune_steps": 1,
            "demo_batch_size": 2,
            "demo_prompts": 2,
            "steps": 2,
            "device": "cpu",
            "output_dir": tmp_path / "demo",
        },
    )
    result = run_demo(config)
    assert len(result["summary"]) == 5
    assert list(result["arms"]) == ["base", "dpt", "dpt_correct", "dpt_best4", "live", "live_correct"]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "1 steps of probing and 1 of tuning at batch 2" in page
    assert "after tuning: itm_text" in page and "loss_mse" not in page.split("after tuning:")[1].split("</p>")[0]
    assert "LoRA tuned just now, on this machine" in page
    made = ("probe/adapter/model.safetensors", "tune/pytorch_lora_weights.safetensors", "alignment/alignment.json")
    for artifact in made:
        assert (tmp_path / "demo" / artifact).is_file()
    _clear(tmp_path / "demo")  # its own stages go when it runs again
    assert not (tmp_path / "demo" / "tune").exists() and (tmp_path / "demo" / made[-1]).is_file()


def test_a_judge_that_does_not_draw_is_refused_before_anything_is_removed(base, tmp_path):
    (tmp_path / "probe").mkdir()
    settings = {"pretrained_model_name_or_path": str(base), "lora_draws": False, "output_dir": tmp_path}
    with pytest.raises(InputError, match="leave no_lora_draws out"):
        run_demo(build_config(DemoConfig, overrides=settings))
    assert (tmp_path / "probe").is_dir()


def test_seeds_that_cannot_be_read_are_refused_before_anything_is_removed(base, tmp_path):
    settings = {"pretrained_model_name_or_path": str(base), "seeds": "foo", "output_dir": tmp_path}
    (tmp_path / ".demo").touch()
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "kept").touch()
    with pytest.raises(InputError, match="seeds `foo`"):
        run_demo(build_config(DemoConfig, overrides=settings))
    assert (tmp_path / "probe" / "kept").is_file()


def test_a_stopped_demo_does_not_advise_to_go_on_with_its_stage(base, tmp_path, monkeypatch):
    def stop(config):
        raise Stopped(15, "SIGTERM: go on with --resume_from_checkpoint latest")

    monkeypatch.setattr(demo, "run_probe", stop)
    with pytest.raises(Stopped, match="^SIGTERM: stopped; another `dpt demo` begins anew$"):
        run_demo(
            build_config(DemoConfig, overrides={"pretrained_model_name_or_path": str(base), "output_dir": tmp_path})
        )


def test_stages_of_another_run_are_not_removed(base, tmp_path):
    work = tmp_path / "tune" / "pytorch_lora_weights.safetensors"
    work.parent.mkdir()
    work.write_text("days of work")
    settings = {"pretrained_model_name_or_path": str(base), "output_dir": tmp_path}
    with pytest.raises(InputError, match="tune is there and no demo's; give another --output_dir"):
        run_demo(build_config(DemoConfig, overrides=settings))
    assert work.read_text() == "days of work"


def test_a_base_that_ships_nothing_is_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "bare")
    config = build_config(DemoConfig, overrides={"pretrained_model_name_or_path": str(tmp_path / "bare")})
    with pytest.raises(InputError, match="ships none"):
        run_demo(config)


def test_a_launcher_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="the demo is for one process; start it without a launcher"):
        run_demo(DemoConfig(output_dir=tmp_path))
