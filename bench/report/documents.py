"""Documents with generated tables, each between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re

from bench.report import architecture, readme, tables

TABLES = tables.TABLES | readme.TABLES | {"packages": architecture.package_table}

DOCUMENTS = (
    "README.md",
    "README.zh.md",
    "docs/design.md",
    "docs/performance.md",
    "docs/benchmarking.md",
    "docs/cpu.md",
    "docs/precision.md",
)


def with_new_tables(text: str) -> str:
    """Returns a document with its tables replaced; raises ValueError for an unknown table."""

    def replacement(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"table is {match[1]!r}; expected one of {', '.join(TABLES)}")
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", replacement, text, flags=re.DOTALL)
