"""What the shipped adapters can tell on held-out scenes -> benchmarks/results/probe.json.

    python benchmarks/probe.py --n 2000

`frozen`: stage 1's adapter on the plain base. `tuned`: stage 2's adapter with its LoRA. Each at t = 500 and 250; the
headline is at the one that did better on other records. `rec_oracle`: a matched filter told the true colour and size,
at the tuned one's noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.evaluation.examples import examples_of
from dpt_t2i.evaluation.itm import itm_scores, itm_summary
from dpt_t2i.evaluation.provenance import versions
from dpt_t2i.evaluation.rec import rec_oracle, rec_ranks, rec_summary
from dpt_t2i.sampling.model import load_model

TIMESTEPS = (500, 250)
CHOOSING = 500  # records that the timestep is chosen on, none of which is reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000, help="held-out examples")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/probe.json"))
    args = parser.parse_args()
    records = SceneRecords("val", args.n, 64, seed=1)  # seed 0's are the validation set of the runs
    choosing = SceneRecords("val", CHOOSING, 64, seed=2)
    result: dict[str, Any] = {}
    for name, lora in (("frozen", "none"), ("tuned", None)):
        model = load_model("bundled", lora)
        if model.scorer is None or (name == "tuned" and not hasattr(model.backbone.denoiser, "peft_config")):
            raise SystemExit(f"the bundled model ships no {name} adapter; run the stages of tools/bundled first")
        chosen = _better_timestep(_figures(model.scorer, choosing, len(choosing)))
        by_timestep = _figures(model.scorer, records, args.n)
        headline = next(row for row in by_timestep if row["t"] == chosen)
        result[name] = headline | {"by_timestep": by_timestep}
        if name == "frozen":
            oracle = rec_summary(rec_oracle(model.backbone, examples_of(records, 64), TIMESTEPS), at=(1,))
            result["rec_oracle_by_timestep"] = {t: row["precision@1"]["accuracy"] for t, row in oracle.items()}
    result["rec_oracle"] = result["rec_oracle_by_timestep"][str(result["tuned"]["t"])]
    result |= {"command": " ".join(["python", *sys.argv]), "versions": versions()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _better_timestep(figures: list[dict[str, float]]) -> float:
    return max(figures, key=lambda row: row["itm_text"] + row["itm_image"] + row["rec_p1"])["t"]


def _figures(scorer: Any, records: SceneRecords, count: int) -> list[dict[str, float]]:
    itm = itm_summary(itm_scores(scorer, examples_of(records, 64), TIMESTEPS))
    rec = rec_summary(rec_ranks(scorer, examples_of(records, 64), TIMESTEPS))
    return [
        {
            "t": t,
            "n": count,
            "itm_text": itm[str(t)]["text"]["accuracy"],
            "itm_image": itm[str(t)]["image"]["accuracy"],
            **{f"rec_p{k}": rec[str(t)][f"precision@{k}"]["accuracy"] for k in (1, 5, 10)},
            "itm_text_by_rule": {rule: row["accuracy"] for rule, row in itm[str(t)]["rules"].items()},
        }
        for t in TIMESTEPS
    ]


if __name__ == "__main__":
    main()
