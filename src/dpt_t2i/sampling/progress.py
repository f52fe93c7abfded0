"""How far the drawing is, for eyes: a bar that counts images, and tells the sampling step of the one at work."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from tqdm.auto import tqdm

from dpt_t2i.config import GenerateConfig
from dpt_t2i.sampling.folder import Make
from dpt_t2i.sampling.generate import Generated, Job
from dpt_t2i.sampling.loop import Step
from dpt_t2i.sampling.model import T2IModel

PATIENCE = 60.0  # seconds between two lines in a log

log = logging.getLogger(__name__)


def watched(model: T2IModel, config: GenerateConfig, arm: str, shown: bool) -> Make:
    """`model.run` under `config`, behind a bar named `arm` where `shown`; in a log file, a line now and then."""

    def make(missing: Sequence[Job]) -> Iterator[Generated]:
        with tqdm(total=len(missing), desc=arm, unit="image", disable=None if shown else True) as bar:

            def tell(step: Step) -> None:
                bar.set_postfix_str(f"step {step.index + 1}/{config.sample.steps}")

            told = time.monotonic()
            for number, image in enumerate(model.run(missing, config, tell), start=1):
                yield image
                bar.update()
                if shown and bar.disable and time.monotonic() - told > PATIENCE:
                    told = time.monotonic()
                    log.info("%s: %d of %d images", arm, number, len(missing))

    return make
