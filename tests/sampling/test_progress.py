"""The bar of a drawing command: counts images, tells steps, and is silent where nobody watches."""

import io
import sys

from dpt_t2i.config import GenerateConfig, build_config
from dpt_t2i.sampling import progress
from dpt_t2i.sampling.generate import jobs_of
from dpt_t2i.sampling.model import T2IModel
from dpt_t2i.sampling.progress import watched
from tests.tiny import tiny_backbone

CONFIG = build_config(GenerateConfig, overrides={"steps": 3, "guidance_scale": 1.0, "batch_size": 1})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def draw(monkeypatch, stream, shown=True):
    monkeypatch.setattr(sys, "stderr", stream)
    jobs = jobs_of(["a star", "a red circle"], [0])
    images = list(watched(T2IModel(tiny_backbone()), CONFIG, "tuned", shown)(jobs))
    assert [image.job for image in images] == jobs
    return stream.getvalue()


def test_images_are_counted_and_steps_told(monkeypatch):
    told = draw(monkeypatch, Terminal())
    assert "tuned:   0%" in told and "2/2" in told and "step 3/3" in told


def test_a_log_gets_a_line_now_and_then(monkeypatch, caplog):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with caplog.at_level("INFO", "dpt_t2i"):
        draw(monkeypatch, io.StringIO())
        draw(monkeypatch, io.StringIO(), shown=False)
        draw(monkeypatch, Terminal())
    told = [record.getMessage() for record in caplog.records]
    assert told == ["tuned: 1 of 2 images", "tuned: 2 of 2 images"], "of one process, and not beside a bar"


def test_nothing_is_drawn_into_a_log_or_by_other_processes(monkeypatch):
    assert draw(monkeypatch, io.StringIO()) == ""
    assert draw(monkeypatch, Terminal(), shown=False) == ""
