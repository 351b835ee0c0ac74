"""Every published page is what its script makes of its cells, and can be made of none."""

import importlib
import sys

import pytest

from conftest import ROOT

PAGES = {
    **{"minitron": "Minitron", "sparsity": "Sparsity", "quantization": "Quantization"},
    **{"deploy": "Deployment", "qsd": "Quantized spike-driven transformers"},
}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The folder of benchmarks on the path; its modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def page_of(name, cells):
    script = importlib.import_module(name)
    make = importlib.import_module("experiments").page
    files = [*getattr(script, "OPENING", ()), *script.EXPERIMENTS.values()]
    return make(cells, PAGES[name], script.__doc__, files)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_made_of_its_cells(name, tmp_path):
    cells = importlib.import_module("cells").Cells
    published = cells(name)
    text = published.page.read_text(encoding="utf-8")
    published.page = tmp_path / published.page.name  # beside it, charts are drawn
    assert page_of(name, published) == text


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("left", [0, 1])
def test_a_page_can_be_made_of_half_the_cells(name, left, tmp_path):
    cells = importlib.import_module("cells").Cells
    published = cells(name)
    published.page = tmp_path / published.page.name
    published.found = dict(list(published.found.items())[left::2])
    assert page_of(name, published)


@pytest.mark.parametrize("name", PAGES)
def test_missing_cells_say_so(name, tmp_path):
    cells = importlib.import_module("cells").Cells
    assert "not run" in page_of(name, cells(name, tmp_path))
