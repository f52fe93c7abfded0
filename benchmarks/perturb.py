"""Are rule-made negatives false, and how often does each rule apply? -> benchmarks/results/perturb.json

    python benchmarks/perturb.py --n 5000 --captions sugarcrepe/replace_rel.json sugarcrepe/swap_att.json

`scenes`: every negative of `n` scene captions, read back into claims and held against the drawn truth (`wrong`) and
against the checker's reading of the picture (`accepted`). `captions`: files of SugarCrepe's form (a JSON object of
objects with `caption`), of which `--sample` different captions are drawn; share of them to which each rule applies.
`--pairs` of their negatives are printed as a Markdown table for people to judge; they go into no file.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpt_t2i.data.perturb import RULES, perturb
from dpt_t2i.evaluation.provenance import versions, write_json
from dpt_t2i.scenes.checker import detect
from dpt_t2i.scenes.example import make_example, true_of
from dpt_t2i.scenes.facts import judge
from dpt_t2i.scenes.reading import read_facts
from dpt_t2i.scenes.render import render

SEED = 7919  # of the validation stream, as in benchmarks/checker.py

log = logging.getLogger("perturb")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5000, help="scene captions")
    parser.add_argument("--captions", type=Path, nargs="*", default=[], help="SugarCrepe's files")
    parser.add_argument("--sample", type=int, default=500, help="captions drawn from those files")
    parser.add_argument("--pairs", type=int, default=20, help="pairs printed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/perturb.json"))
    args = parser.parse_args()
    result: dict[str, Any] = {"scenes": _scenes(args.n)}
    if args.captions:
        result["captions"] = _captions(args.captions, args.sample, args.pairs)
    files = ["--captions", *(path.name for path in args.captions)] if args.captions else []
    command = shlex.join(["python", "benchmarks/perturb.py", "--n", str(args.n), *files])
    result |= {"command": command, "versions": versions()}
    write_json(args.output, result)
    log.info("%s", json.dumps({key: result[key] for key in ("scenes", "captions") if key in result}, indent=2))


def _scenes(count: int) -> dict[str, Any]:
    made, wrong, accepted = Counter[str](), Counter[str](), Counter[str]()
    without = misread = 0
    for index in range(count):
        example = make_example(index, seed=SEED, split="val")
        misread += read_facts(example.caption.text) != example.caption.facts
        negatives = perturb(example.caption.text, seed=0, index=index)
        without += not negatives
        seen = detect(render(example.scene, 64))
        for negative in negatives:
            facts = read_facts(negative.caption)
            made[negative.rule] += 1
            wrong[negative.rule] += true_of(facts, example.scene)
            accepted[negative.rule] += judge(facts, seen).correct
    return {
        "captions": count,
        "captions_misread": misread,
        "captions_without_negative": without,
        "negatives": made.total(),
        "wrong": wrong.total() / made.total(),
        "accepted_by_checker": accepted.total() / made.total(),
        "by_rule": {r: {"made": made[r], "wrong": wrong[r], "accepted_by_checker": accepted[r]} for r in RULES},
    }


def _captions(files: Sequence[Path], sample: int, pairs: int) -> dict[str, Any]:
    texts = [row["caption"].strip() for file in files for row in json.loads(file.read_text("utf-8")).values()]
    texts = sorted(set(texts))
    rng = random.Random(SEED)
    drawn = rng.sample(texts, sample)
    negatives = [(text, negative) for i, text in enumerate(drawn) for negative in perturb(text, seed=0, index=i)]
    log.info("| rule | caption | negative |\n|---|---|---|")
    for text, negative in rng.sample(negatives, pairs):
        log.info("| %s | %s | %s |", negative.rule, text, negative.caption)
    applies = Counter(negative.rule for _, negative in negatives)
    return {
        "captions": sample,
        "of": len(texts),
        "without_negative": sample - len({text for text, _ in negatives}),
        "applies": {rule: applies[rule] for rule in RULES},
    }


if __name__ == "__main__":
    main()
