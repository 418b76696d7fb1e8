"""Generated tables of the documents agree with the committed results."""

import re

import pytest

from bench.report.documents import DOCUMENTS, with_new_tables
from bench.workloads import ROOT


@pytest.mark.parametrize(
    "name",
    [  # the predictions in docs/performance.md take ten seconds
        pytest.param(n, marks=pytest.mark.full) if n == "docs/performance.md" else n
        for n in DOCUMENTS
    ],
)
def test_tables_agree_with_the_results(name):
    text = (ROOT / name).read_text()
    assert with_new_tables(text) == text, "python -m bench.report"


@pytest.mark.parametrize(
    ("name", "to", "times"), [("README.md", "to", "times"), ("README.zh.md", "至", "倍")]
)
def test_the_headline_is_the_range_of_the_measured_table(name, to, times):
    """For every CPU the speedups over the fastest baseline and over diffusers."""
    text = " ".join((ROOT / name).read_text().split())
    row = r"\| ([^|,]*), [^|,]*, \S+ \d+ \| [\d.]+ \| [^|]*: ([\d.]+) \([^|]*\| ([\d.]+) \("
    rows = re.findall(row, text)
    assert rows
    for cpu in {cpu for cpu, *_ in rows}:
        for column in (1, 2):
            speedups = [float(r[column]) for r in rows if r[0] == cpu]
            speedup_range = f"{min(speedups):.1f} {to} {max(speedups):.1f} {times}"
            assert speedup_range in text.split("<!-- table")[0], cpu


@pytest.mark.full
def test_a_stale_table_is_detected():
    text = (ROOT / "docs" / "performance.md").read_text()
    assert with_new_tables(text.replace("20,496", "30,496")) == text


def test_an_unknown_table_is_an_error():
    with pytest.raises(ValueError, match="table is 'speed'; expected one of predicted, targets"):
        with_new_tables("<!-- table: speed -->\n<!-- end -->")
