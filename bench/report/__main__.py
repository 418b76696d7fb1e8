"""Rewrites the tables and figures of the documents from the committed results.

    python -m bench.report                          rewrites tables and figures
    python -m bench.report --check                  exit code 1 if a table differs from the results
    python -m bench.report --results DIR --machine cpu-amd-zen4
                                                    first commits the results of DIR for this CPU

Predictions are computed from the plans and labelled as such; measurements are in bench/results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.report import architecture, figures
from bench.report.committed import commit
from bench.report.documents import DOCUMENTS, with_new_tables
from bench.workloads import ROOT
from ddpm_fast.utils.files import write_atomically


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the tables with the results, write nothing"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="results to commit, written by `make bench`"
    )
    parser.add_argument(
        "--machine", help="with --results: folder in bench/results, such as cpu-amd-zen4"
    )
    args = parser.parse_args()
    if (args.results is None) != (args.machine is None) or (args.check and args.results):
        parser.error("--results and --machine need each other and exclude --check")
    if args.results is not None:
        try:
            for path in commit(args.results, args.machine):
                print(f"{path.relative_to(ROOT)} written")
        except ValueError as error:
            parser.error(str(error))
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text()
        new = with_new_tables(old)
        if new != old:
            stale.append(name)
            if not args.check:
                write_atomically(path, new.encode())
    if not args.check:
        figures.draw(ROOT / "docs" / "figures")
        architecture.draw(ROOT / "docs" / "figures" / "packages.png")
    message = "does not match the results" if args.check else "rewritten"
    print("\n".join(f"{name} {message}" for name in stale) or "all tables match the results")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
