"""The documents say what the results say."""

import pytest

from bench import report


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_tables_are_what_the_results_say(name):
    text = (report.ROOT / name).read_text()
    assert report.renewed(text) == text, "python -m bench.report"


def test_a_stale_table_and_an_unknown_one_are_found():
    text = (report.ROOT / "docs" / "performance.md").read_text()
    assert report.renewed(text.replace("20,496", "30,496")) == text
    with pytest.raises(ValueError, match="table 'speed'; known: predicted, bars"):
        report.renewed("<!-- table: speed -->\n<!-- end -->")
