"""Import direction: packages import only packages of a lower rank, without file-level cycles."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From low to high rank; packages of one entry do not import each other.
ORDER = [
    {"utils", "kernels"},
    {"data", "models"},
    {"diffusion"},
    {"checkpoints"},
    {"engines"},
    {"sampling"},
    {"evaluation"},
    {"training", "integrations"},
    {"plotting"},
    {"benchmark"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def modules():
    """Maps each module name to its file: the library, bench, examples and weights scripts."""
    files = {f"ddpm_fast.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    for root in ("ddpm_fast", "bench", "examples", "weights"):
        for path in sorted((ROOT / root).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] != ("ddpm_fast", "kernels"):  # a link to the files above
                files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = modules()


def imported_modules(name, path):
    """Modules that a file imports anywhere: at the top, in functions, under TYPE_CHECKING."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{source}.{alias.name}" for alias in node.names]
            targets = [t if t in FILES else source for t in targets]
        else:
            continue
        yield from (t for t in targets if t in FILES and t != name)


GRAPH = {name: set(imported_modules(name, path)) for name, path in FILES.items()}


def package_of(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "ddpm_fast" and len(parts) > 1 else None


def test_packages_import_packages_of_a_lower_rank():
    wrong = []
    for module, targets in GRAPH.items():
        source = package_of(module)
        if source is None or source not in RANK:
            continue
        for target in targets:
            package = package_of(target)
            if package is None or package == source:
                continue
            if package not in RANK or RANK[package] >= RANK[source]:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_every_package_has_a_rank():
    packages = {p.name for p in (ROOT / "ddpm_fast").iterdir() if (p / "__init__.py").exists()}
    assert packages <= set(RANK), f"add {packages - set(RANK)} to ORDER"


def test_no_file_level_cycle():
    """Depth-first search. The lazily loaded names of ddpm_fast/__init__.py do not count."""
    graph = {
        m: {t for t in targets if t != "ddpm_fast"}
        for m, targets in GRAPH.items()
        if m != "ddpm_fast"
    }
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        for target in sorted(graph.get(module, ())):
            cycle = visit(target)
            if cycle:
                return cycle
        path.pop()
        done.add(module)
        return None

    for module in graph:
        cycle = visit(module)
        assert cycle is None, " -> ".join(cycle)


def test_the_library_imports_neither_tests_nor_testing():
    outside = ("ddpm_fast.testing", "bench", "tests", "examples")
    wrong = [
        f"{module} imports {target}"
        for module, targets in GRAPH.items()
        if module.startswith("ddpm_fast") and module != "ddpm_fast.testing"
        for target in targets
        if target.startswith(outside)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_outside_tests_is_too_long():
    lengths = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert not {module: length for module, length in lengths.items() if length > 350}
