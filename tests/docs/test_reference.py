"""The generated pages say what the code says."""

import pytest

from tests.benchmarks import report_docs
from tests.docs import reference


@pytest.mark.parametrize("name", reference.PAGE_MAKERS)
def test_the_committed_reference_page_is_what_the_code_gives(name):
    committed = (reference.PAGES / name).read_text(encoding="utf-8")
    assert committed == reference.PAGE_MAKERS[name](), "run `make reference` and commit docs/api"


def test_every_route_is_described_and_no_description_has_lost_its_route():
    assert {f"{method} {path}" for method, path, _ in reference.routes()} == set(reference.ROUTES)


def test_every_metric_has_a_help_text():
    assert [name for name, _, text in reference.named_metrics() if not text] == []


def test_the_benchmark_page_shows_the_saved_results():
    page = report_docs.PAGE.read_text(encoding="utf-8")
    assert page == report_docs.updated(page), "run `make reference` and commit docs/benchmarks.md"
