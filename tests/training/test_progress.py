"""What is said of a run under way."""

import pytest

from dpt_t2i.training import progress
from dpt_t2i.training.progress import Progress, describe

ROW = {"loss": 2.31, "loss_i2t": 0.512, "loss_mse": 0.0814, "lr": 1e-4, "grad_norm": 5.0, "images_per_s": 8.0}


def test_a_line_has_terms_rate_and_speed():
    assert describe(ROW) == "loss 2.310 (i2t 0.512 mse 0.081)  lr 1.0e-04  8.0 images/s"
    assert describe(ROW | {"skipped": 2}).endswith("8.0 images/s  2 steps skipped")
    assert "skipped" not in describe(ROW | {"skipped": 0})


def test_a_log_file_gets_lines_with_the_time_left(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    caplog.set_level("INFO", logger="dpt_t2i")
    shown = Progress(total=1000, first=100, examples_a_step=4, shown=True)
    now[0] += 5.0
    assert shown.images_per_s(110) == pytest.approx(8.0)  # 10 steps of 4 in 5 s
    shown.show(110, ROW)
    # 890 steps of 4 images at 8 a second
    assert "step 110/1000  loss 2.310" in caplog.text and caplog.text.strip().endswith("ETA 0:07:25")
    now[0] += 60.0
    shown.restart(110)  # a validation took that minute
    now[0] += 2.0
    assert shown.images_per_s(114) == pytest.approx(8.0)


def test_the_other_processes_are_silent(caplog):
    caplog.set_level("INFO", logger="dpt_t2i")
    Progress(total=10, first=0, examples_a_step=4, shown=False).show(5, ROW)
    assert caplog.text == ""
