"""Import direction: ddpm_fast does not import bench, and the files of bench have no cycle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imports_of(path):
    """All modules that a file imports, also in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_bench_has_no_import_cycle():
    files = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts): p
        for p in (ROOT / "bench").rglob("*.py")
    }
    order = list(
        TopologicalSorter(
            {name: files.keys() & set(imports_of(p)) for name, p in files.items()}
        ).static_order()
    )
    assert (
        order.index("bench.gpu.context")
        < order.index("bench.gpu.network")
        < order.index("bench.gpu.__main__")
    )


def test_ddpm_fast_does_not_import_bench():
    for path in (ROOT / "ddpm_fast").rglob("*.py"):
        assert not any(name.split(".")[0] == "bench" for name in imports_of(path)), path
