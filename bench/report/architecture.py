"""Import graph of the repository, read from its source; table and figure of package imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ddpm_fast.plotting.style import BLUE, GREEN, GREY, ORANGE, PINK, figure, save

ROOT = Path(__file__).parents[2]
LAYERS = {  # of the figure: name -> colour, packages
    "shared": (GREY, ("utils", "kernels")),
    "data and mathematics": (GREEN, ("data", "models", "diffusion", "checkpoints")),
    "execution": (BLUE, ("engines", "sampling")),
    "applications": (ORANGE, ("evaluation", "training")),
    "interface": (PINK, ("plotting", "benchmark", "cli")),
}


def modules() -> dict[str, Path]:
    """Maps each module name to its file: the library, bench, examples and weights scripts."""
    files = {f"ddpm_fast.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    for root in ("ddpm_fast", "bench", "examples", "weights"):
        for path in sorted((ROOT / root).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] != ("ddpm_fast", "kernels"):  # the link
                files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_modules(name: str, path: Path, files: dict[str, Path]) -> Iterator[str]:
    """Modules that a file imports anywhere: at the top, in functions, under TYPE_CHECKING."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{source}.{alias.name}" for alias in node.names]
            targets = [t if t in files else source for t in targets]
        else:
            continue
        yield from (t for t in targets if t in files and t != name)


@cache
def import_graph() -> dict[str, set[str]]:
    """Maps each module name to the modules that it imports."""
    files = modules()
    return {name: set(imported_modules(name, path, files)) for name, path in files.items()}


def package_of(module: str) -> str | None:
    """The package of ddpm_fast that a module belongs to, or the top-level module; None outside."""
    parts = module.split(".")
    return parts[1] if parts[0] == "ddpm_fast" and len(parts) > 1 else None


def package_imports() -> dict[str, list[str]]:
    """Maps each package of ddpm_fast to the packages that it imports, both in import order: a
    package comes after all that it imports.
    """
    packages = {p.parent.name for p in (ROOT / "ddpm_fast").glob("*/__init__.py")} | {"kernels"}
    imports: dict[str, set[str]] = {package: set() for package in packages}
    for module, targets in import_graph().items():
        if (package := package_of(module)) in packages:
            imports[package] |= {p for p in map(package_of, targets) if p in packages - {package}}

    @cache
    def level(package: str) -> int:
        return 1 + max(map(level, imports[package]), default=-1)

    order = sorted(packages, key=lambda package: (level(package), package))
    return {package: [p for p in order if p in imports[package]] for package in order}


def package_table() -> str:
    """Markdown table of the packages' imports."""
    rows = [
        f"| `{package}` | {', '.join(f'`{p}`' for p in imported)} |"
        for package, imported in package_imports().items()
    ]
    return "\n".join(["| package | imports |", "| --- | --- |", *rows])


def draw(out: Path) -> None:
    """Draws which package imports which, as a matrix whose rows are the packages."""
    imports = package_imports()
    order, count = list(imports), len(imports)
    color = {package: c for c, packages in LAYERS.values() for package in packages}
    plot, axes = figure(width=9, height=6)
    for row, package in enumerate(order):
        text = dict(va="center", color="white", fontsize=11, weight="bold")
        box = dict(boxstyle="round,pad=0.35", color=color.get(package, GREY))
        axes.text(-1, row, package.center(14), ha="right", family="monospace", bbox=box, **text)
        columns = [order.index(imported) for imported in imports[package]]
        axes.hlines(row, -0.8, max(columns, default=-0.8), color=GREY, linewidth=0.6, zorder=0)
        for column in columns:
            axes.plot(column, row, "o", color=color.get(order[column], GREY), ms=11)
    for name, (c, _) in LAYERS.items():
        axes.plot([], [], "s", color=c, ms=9, label=name)
    axes.legend(frameon=False, loc="lower right", fontsize=10)
    anchor = dict(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xticks(range(count - 1), order[:-1], fontsize=10, **anchor)
    axes.set(xlim=(-3.8, count - 1.2), ylim=(-0.7, count - 0.3), yticks=[])
    axes.set_xlabel(
        "a point: the package of the row imports the package of the column", loc="right"
    )
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    save(plot, out)
