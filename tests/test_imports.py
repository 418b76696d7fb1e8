"""Import direction: packages import only packages of a lower rank, without file-level cycles."""

from bench.report.architecture import ROOT, import_graph, modules, package_of

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

FILES, GRAPH = modules(), import_graph()


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
