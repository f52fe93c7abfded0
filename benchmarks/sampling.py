"""What a corrected sampling step costs over an uncorrected guided one -> benchmarks/results/sampling.json.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --base bundled --base PATH/TO/DIFFUSERS/FOLDER --output runs/sampling.json

One thread, DDIM, guidance 4, mode `state`. Time is the process's CPU time, which on one thread is wall time less what
other programs took. The three kinds of step take turns within a round; a figure is the median over rounds and steps.
A base that ships no adapter gets a random one of small sizes: what it says does not matter here, only what it costs.
Figures of other bases that stand in the output file stay there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.config import AdapterConfig, CorrectionConfig, SampleConfig
from dpt_t2i.evaluation.provenance import versions
from dpt_t2i.sampling.loop import sample
from dpt_t2i.sampling.model import load_model
from dpt_t2i.sampling.noise import initial_noise
from dpt_t2i.sampling.scoring import MatchScorer

PROMPT = "a red circle left of a blue square"
STEPS = 8  # of a run; the first warms up, the last is never corrected by a fused run: neither is counted
KINDS = {
    "plain": CorrectionConfig(),
    "standard": CorrectionConfig(correct=0.02, correction_rule="relative"),
    "fused": CorrectionConfig(correct=0.02, correction_rule="relative", correction_fused=True),
}
# The sizes of the adapter with which the released code was timed (hidden 64, 10 + 20 queries).
SMALL = AdapterConfig(hidden_dim=64, num_heads=4, dim_feedforward=128, num_queries_rec=20, contrastive_dim=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", help="`bundled` (default), a diffusers folder, or a hub id")
    parser.add_argument("--tap", default="up1", help="tap of a random adapter")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="images at once")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each kind of step")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sampling.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    bases = args.base or ["bundled"]
    result: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    for base in bases:
        name, batches = Path(base).name, " ".join(map(str, args.batch))  # no path of this machine
        result[name] = {f"batch_{n}": figures for n, figures in _measure(base, args.tap, args.batch, args.rounds)}
        result[name]["command"] = (
            f"python benchmarks/sampling.py --base {name} --batch {batches} --rounds {args.rounds}"
        )
    result |= {"threads": torch.get_num_threads(), "versions": versions()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _measure(base: str, tap: str, batches: list[int], rounds: int) -> list[tuple[int, dict[str, float]]]:
    model = load_model(base, device="cpu")
    scorer = model.scorer or _random_scorer(model.backbone, tap)
    return [(batch, _figures(model.backbone, scorer, batch, rounds)) for batch in batches]


def _figures(backbone: Backbone, scorer: MatchScorer, batch: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds of a step of each kind, and its overhead over a plain one."""
    text, null = backbone.encode_text([PROMPT] * batch), backbone.null_text(batch)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, correction in KINDS.items():
            times[kind] += _step_times(backbone, scorer, text, null, correction)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        **{f"{kind}_ms": round(1000 * value, 2) for kind, value in medians.items()},
        "standard_over_plain": round(medians["standard"] / medians["plain"], 3),
        "fused_over_plain": round(medians["fused"] / medians["plain"], 3),
    }


def _step_times(
    backbone: Backbone, scorer: MatchScorer, text: TextStates, null: TextStates, correction: CorrectionConfig
) -> list[float]:
    """CPU seconds of each counted step of one run."""
    side = tuple(pixels // backbone.vae_scale for pixels in backbone.image_size)
    noise = initial_noise(0, (len(text), backbone.latent_channels, *side))
    ends: list[float] = []
    settings = SampleConfig(steps=STEPS, guidance_scale=4.0, eta=0.0)
    sample(backbone, text, null, noise, settings, correction, scorer, lambda _step: ends.append(time.process_time()))
    return [end - start for start, end in zip(ends, ends[1:], strict=False)][:-1]


def _random_scorer(backbone: Backbone, tap: str) -> MatchScorer:
    taps = backbone.parse_taps(tap)
    torch.manual_seed(0)
    channels = {one.name: one.channels for one in taps}
    return MatchScorer(backbone, DiscriminativeAdapter(SMALL, channels, backbone.pooled_dim, backbone.text_dim), taps)


if __name__ == "__main__":
    main()
