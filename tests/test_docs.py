"""Links of the documentation: linked files exist and define the names in the links' texts."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("*/README.md")])
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def names_of(node):
    """Names of the functions, classes, constants, methods and fields that a syntax tree defines."""
    names = set()
    for part in node.body:
        targets = [*getattr(part, "targets", []), getattr(part, "target", None)]
        names |= {t.id for t in targets if hasattr(t, "id")} | {getattr(part, "name", "")}
        if isinstance(part, ast.ClassDef):
            names |= {f"{part.name}.{name}" for name in names_of(part)}
    return names


def names_in(path):
    """A Python file's name and the names that it defines."""
    return {path.name} | names_of(ast.parse(path.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
    broken = []
    for text, target, _ in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path, name = (page.parent / target).resolve(), re.fullmatch(r"`([\w.]+)`", text)
        if not path.exists():
            broken.append(target)
        elif name and path.suffix == ".py" and name[1] not in names_in(path):
            broken.append(f"{name[1]} in {target}")
    assert not broken


@pytest.mark.parametrize("name", ["ddpm.md", "ddpm.zh.md"])
def test_every_equation_names_its_function_and_its_test(name):
    """The table at the top has all sixteen, each with a function and a test of this project."""
    text = (ROOT / "docs" / name).read_text()
    rows = re.findall(
        r"^\|[^|]*\| \[\((\d+)\)\]\(#[^)]*\) \|[^|]*\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE
    )
    assert [int(number) for number, *_ in rows] == list(range(1, 17))
    for number, functions, tests in rows:
        assert "](../ddpm_fast/" in functions or "](../kernels/" in functions, number
        assert "`test_" in tests and "](../tests/" in tests, number


def test_the_translation_has_every_equation_and_link_of_the_original():
    """Both have the same number of displayed equations, and the same tags, links and figures."""
    original, translated = (
        (ROOT / "docs" / name).read_text() for name in ("ddpm.md", "ddpm.zh.md")
    )
    displayed = re.compile(r"\$\$.*?\$\$", re.DOTALL)
    assert len(displayed.findall(original)) == len(displayed.findall(translated))
    tags = re.compile(r"\\tag\{(\d+)\}")
    assert tags.findall(original) == tags.findall(translated)
    links = [
        sorted(target for _, target, _ in LINK.findall(text) if target.endswith((".py", ".png")))
        for text in (original, translated)
    ]
    assert links[0] == links[1]
