"""What the pages say about the code is there: every linked file, and every name said to be in it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("*/README.md")])
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def names_of(path):
    """Functions, classes, their methods and fields, constants."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        targets = [
            *getattr(node, "targets", []),
            *([node.target] if isinstance(node, ast.AnnAssign) else []),
        ]
        for name in (
            (node.name,) if hasattr(node, "name") else [t.id for t in targets if hasattr(t, "id")]
        ):
            found.add(name)
            for part in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
                found.add(
                    f"{name}.{getattr(part, 'name', getattr(getattr(part, 'target', None), 'id', ''))}"
                )
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for text, target, _ in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path = (page.parent / target).resolve()
        if not path.exists():
            broken.append(target)
        name = re.fullmatch(r"`([\w.]+)`", text)
        if (
            path.suffix == ".py"
            and path.exists()
            and name
            and name[1] != path.name
            and name[1] not in names_of(path)
        ):
            broken.append(f"{name[1]} in {target}")
    assert not broken


@pytest.mark.parametrize("name", ["ddpm.md", "ddpm.zh.md"])
def test_every_equation_names_its_function_and_its_test(name):
    """The table at the top has all sixteen, each with a function of ours and a test."""
    text = (ROOT / "docs" / name).read_text()
    rows = re.findall(
        r"^\|[^|]*\| \[\((\d+)\)\]\(#[^)]*\) \|[^|]*\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE
    )
    assert [int(number) for number, *_ in rows] == list(range(1, 17))
    for number, functions, tests in rows:
        assert "](../ddpm_fast/" in functions or "](../kernels/" in functions, number
        assert "`test_" in tests and "](../tests/" in tests, number


def test_the_translation_has_every_equation_and_link_of_the_original():
    """Equations between dollar signs, links and figures are the same in both, in the same order."""
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
