"""Progress bars of rows show no number of them, and a missing file is found before anything is loaded."""

import json
import re

import datasets
import pytest

from hf_dpzo.cli.main import main
from hf_dpzo.recipe import bars, run, tuning
from hf_dpzo.recipe.loading import load_rows

from support.data_recipes import data_recipe, letter_tokenizer
from support.recipes import refused


@pytest.fixture
def shown(monkeypatch, capsys):
    """What a terminal shows, with every row."""
    real = bars.tqdm
    monkeypatch.setattr(bars, "tqdm", lambda **given: real(**{**given, "disable": False, "mininterval": 0}))
    return lambda: capsys.readouterr().err


@pytest.mark.parametrize("count", [137, 1371])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_no_number_of_rows_is_shown(tmp_path, shown, count, kind):
    rows = [{"text": "ab" if index % 7 else "", "label": str(index % 2)} for index in range(count)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    shown()
    train, _ = load_rows(data_recipe(path), letter_tokenizer())
    said = shown()
    kept = len(train)
    assert "Tokenizing: " in said and "Reading rows: " in said
    numbers = {int(number) for number in re.findall(r"\d+", said)}
    assert not {count, kept, count - kept, count + 1, kept + 1} & numbers
    assert ("100%" in said) == (count > 1000)
    assert not datasets.are_progress_bars_disabled()


def test_bars_that_a_user_hides_stay_hidden(tmp_path, shown):
    datasets.disable_progress_bars()
    try:
        with bars.uncounted_bar("Tokenizing"):
            bars.advance()
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()
    assert shown() == ""


@pytest.mark.parametrize("command", ["train", "plan", "tune"])
@pytest.mark.parametrize("field", ["data", "eval_data"])
def test_a_missing_file_is_found_before_anything_is_loaded(write, workplace, capsys, monkeypatch, command, field):
    monkeypatch.setattr(run, "load_tokenizer", None)
    path = str(workplace / "none.jsonl")
    assert f"{field}={path}: no such file" in refused(capsys, command, write(**{field: path, "eval_rows": "absent"}))


def test_a_missing_file_of_public_rows_is_found_before_anything_is_loaded(write, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "load_tokenizer", None)
    assert main(["tune", write(), "--public", "none.csv"]) == 2
    assert "public=none.csv: no such file" in capsys.readouterr().err
