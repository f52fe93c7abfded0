"""How do 10,000 damaged files a reader end? -> benchmarks/results/fuzz.json

    python -m benchmarks.fuzz
    python -m benchmarks.fuzz --reader webdataset    # only some; what the file says of the others stays

The cases are those of the slow tests in `tests/data/test_fuzz.py`, counted: each file is read twice, once ending at the
first fault (`error`), once leaving out what is broken (`skip`), and gives valid records or is `refused` in one line.
Anything else (a traceback, a record that is not whole) ends the script.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path

from tests.data.test_fuzz import FILES, fuzz

from dpt_t2i.evaluation.provenance import versions, write_json

log = logging.getLogger("fuzz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="damaged files a reader")
    parser.add_argument("--reader", choices=FILES, nargs="+", default=list(FILES), help="files of `FILES`")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fuzz.json"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("dpt_t2i").setLevel(logging.ERROR)  # every fault is told, and there are thousands
    counts: dict[str, dict[str, int]] = {}
    if args.output.is_file():
        counts = json.loads(args.output.read_text())["counts"]
    for form in args.reader:
        counts[form] = {}
        with tempfile.TemporaryDirectory() as folder:
            fuzz(form, Path(folder), args.n, counts[form])
        log.info("%s: %s", form, counts[form])
        result = {"files_a_reader": args.n, "counts": counts, "command": f"python -m benchmarks.fuzz --n {args.n}"}
        write_json(args.output, result | {"versions": versions()})


if __name__ == "__main__":
    main()
