"""The tables of docs/heads.md are those that the code and the installed transformers give."""

import runpy

from transformers.loss.loss_utils import LOSS_MAPPING

from support.paths import ROOT


def test_the_page_of_heads_is_up_to_date():
    module = runpy.run_path(str(ROOT / "benchmarks/heads.py"))
    page = module["PAGE"].read_text(encoding="utf-8")
    assert module["build_page"](page) == page, "run python benchmarks/heads.py"
    assert all(f"`{name}`" in page for name in LOSS_MAPPING)


def test_a_page_with_other_tables_would_be_found():
    module = runpy.run_path(str(ROOT / "benchmarks/heads.py"))
    page = module["PAGE"].read_text(encoding="utf-8")
    old = page.replace("`MultipleChoiceLoss`", "`FunctionLoss`")
    assert old != page
    assert module["build_page"](old) == page
