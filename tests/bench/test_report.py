"""Generated tables of the documents agree with the committed results."""

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


@pytest.mark.full
def test_a_stale_table_is_detected():
    text = (ROOT / "docs" / "performance.md").read_text()
    assert with_new_tables(text.replace("20,496", "30,496")) == text


def test_an_unknown_table_is_an_error():
    with pytest.raises(ValueError, match="table is 'speed'; expected one of predicted, targets"):
        with_new_tables("<!-- table: speed -->\n<!-- end -->")
