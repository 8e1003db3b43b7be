"""`hf-dpzo predict`, `generate` and `evaluate`, and the code in a card, as a user runs them."""

import csv
import json
import re
import shlex
from pathlib import Path

import datasets
import pytest

from hf_dpzo.cli import asking
from hf_dpzo.cli.main import main


@pytest.fixture
def ask(models, words):
    def run(command: str, *flags: str, folder: Path = words, base: str = "causal") -> int:
        return main([command, str(folder), "--base", str(models / base), "--device", "cpu", *flags])

    return run


ROWS = [("1", "w1 w2", "0"), ("007", "", "1"), ("3", "w3", "1")]


@pytest.fixture
def data(tmp_path) -> Path:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text", "label"), *ROWS])
    return tmp_path / "rows.csv"


def read_csv(path: Path, separator: str = ",") -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter=separator))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_predictions_are_written_behind_each_row_in_its_place(ask, data, tmp_path, suffix, capsys):
    output = tmp_path / f"answers.{suffix}"
    assert ask("predict", "--data", str(data), "--output", str(output)) == 0
    assert "rows without text  1" in capsys.readouterr().out
    if suffix in ("csv", "tsv"):
        found, nothing = read_csv(output, "\t" if suffix == "tsv" else ","), ""
    elif suffix == "parquet":
        found, nothing = datasets.load_dataset("parquet", data_files=str(output), split="train").to_list(), None
    else:
        text = output.read_text()
        found = json.loads(text) if suffix == "json" else [json.loads(line) for line in text.splitlines()]
        nothing = None
    assert [(row["id"], row["text"] or "", row["label"]) for row in found] == ROWS
    assert [row["prediction"] in ("0", "1") for row in found] == [True, False, True]
    assert found[1]["prediction"] == nothing and 0.5 <= float(found[0]["score"]) <= 1


def test_texts_are_answered_without_a_file(ask, capsys):
    assert ask("predict", "--text", "w1 w2", "--text", "w3") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prediction"] in ("0", "1") for line in lines] == [True, True]


def test_answers_may_be_written_by_the_model(ask, writer, data, tmp_path):
    output = tmp_path / "answers.csv"
    flags = ("--data", str(data), "--output", str(output), "--max_new_tokens", "2")
    assert ask("generate", *flags, folder=writer) == 0
    assert [row["id"] for row in read_csv(output)] == [row[0] for row in ROWS]


def test_a_model_is_evaluated_on_a_file(ask, train, words, capsys):
    assert ask("evaluate", "--data", str(words.parent / "rows.csv")) == 0
    out = capsys.readouterr().out
    assert "eval_loss" not in out and len(out.splitlines()) == 3
    assert re.search(r"accuracy +0\.\d+\n", out) and re.search(r"rows +80\n", out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "none.csv"), "data=none.csv: no such file"),
        ((), "data: name a file of rows, or texts by --text"),
        (("--data", "rows.csv", "--output", "rows.csv"), "output=rows.csv: it is the file of the rows"),
        (("--data", "rows.csv", "--output", "answers.xls"), "output=answers.xls: its suffix says no kind of file"),
        (("--data", "rows.csv", "--output", "none/answers.csv"), "there is no such folder"),
        (("--data", "rows.csv", "--output", "old.csv"), "output=old.csv: it is there already; name a new file, or add"),
        (("--data", "other.csv"), "data=other.csv: it has no column text, which the model reads, only words; rename"),
        (("--data", "excel.csv"), 'data=excel.csv: set separator: ";" (--separator ";"), which stands between'),
        (("--text", "w1", "--recipe", "recipe.yaml"), "holds the recipe of its run; leave this out"),
        (("--text", "w1", "--batch_size", "0"), "batch_size=0: a batch needs a row"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_sentence(ask, data, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(data.parent)
    for name, text in (("old", "text\n"), ("other", "words\nw1\n"), ("excel", "text;label\nw1;0\n")):
        Path(f"{name}.csv").write_text(text)
    if "--batch_size" not in flags:
        monkeypatch.setattr(asking, "load_model", lambda *_: pytest.fail("it was loaded before it was refused"))
    assert ask("predict", *flags) == 2
    assert message in capsys.readouterr().err
    assert Path("old.csv").read_text() == "text\n"


def test_rows_without_labels_are_refused_before_a_model_is_loaded_to_evaluate_them(ask, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(asking, "load_model", lambda *_: pytest.fail("it was loaded before it was refused"))
    (tmp_path / "rows.csv").write_text("text\nw1\n")
    assert ask("evaluate", "--data", str(tmp_path / "rows.csv")) == 2
    assert "it has no column label, which holds the labels to compare with text, only text" in capsys.readouterr().err
    assert ask("evaluate") == 2
    assert "data: missing; name a file of rows with labels" in capsys.readouterr().err


def test_answers_replace_a_file_if_asked_to(ask, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text("old")
    assert ask("predict", "--text", "w1", "--output", str(output), "--overwrite") == 0
    assert json.loads(output.read_text())["text"] == "w1"


@pytest.mark.parametrize("kind", ["words", "head", "writer"])
def test_what_a_card_says_of_its_use_runs(request, kind, models, tmp_path, monkeypatch, capsys):
    folder = request.getfixturevalue(kind)
    use = (folder / "README.md").read_text().partition("## Use it")[2]
    assert "[`hf_dpzo`](https://github.com/hf-dpzo/hf_dpzo) is the library that trained" in use
    codes = [block.partition("\n```")[0] for block in use.split("```python\n")[1:]]
    assert "# FOLDER_OR_REPOSITORY is where this card lies" in codes[0]
    assert len(codes) == (2 if kind == "writer" else 1)
    command = use.partition("```bash\n")[2].partition("\n```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text\nw1 w2\nw3\n")
    places = {"FOLDER_OR_REPOSITORY": str(folder), "WHERE_THE_BASE_MODEL_IS": str(models / "causal")}
    for name, place in {**places, "WHERE_IT_IS": str(models / "causal")}.items():
        codes, command = [code.replace(name, place) for code in codes], command.replace(name, place)
    for code in codes:
        exec(compile(code, "card", "exec"), {})
        assert capsys.readouterr().out
    assert main(shlex.split(command)[1:]) == 0
    assert len(read_csv(tmp_path / "answers.csv")) == 2
