"""Data that are not what they seem: one row decides nothing about another, and what cannot be read gets a sentence."""

import datetime
import gzip
import json
import os

import datasets
import pytest

from hf_dpzo.recipe.files import list_suffixes
from hf_dpzo.recipe.loading import load_rows
from hf_dpzo.recipe.tables import load_tables

from support.data_recipes import data_recipe, letter_tokenizer, spell


def texts(path, **changes) -> list[str]:
    return [spell(row["input_ids"]) for row in load_rows(data_recipe(path, **changes), letter_tokenizer())[0]]


def labels(path, **changes) -> list[int]:
    return load_rows(data_recipe(path, **changes), letter_tokenizer())[0]["labels"]


# What a column holds in most rows, and what one row more holds. pandas, Arrow and `datasets` would read all anew.
TIPPING = {
    "dates": ('"2024-01-05T10:00:00"', '"unknown"'),
    "codes": ('"007"', '"x9"'),
    "numbers": ("12", "12.5"),
    "large numbers": ("9007199254740993", "1.5"),
    "truth": ("true", '"perhaps"'),
    "lists": ('"a"', "[1, 2]"),
    "missing": ("4", "null"),
    "digits": ("0.10", "1"),
}


@pytest.mark.parametrize(("most", "other"), TIPPING.values(), ids=TIPPING)
def test_one_row_more_changes_no_other_row_of_json(tmp_path, most, other):
    line = f'{{"text": {most}, "label": 0}}\n'
    found = []
    for name, content in (("few", line * 3), ("more", line * 3 + f'{{"text": {other}, "label": 1, "new": 1}}\n')):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(content)
        found.append([row["text"] for row in load_tables(data_recipe(path))[0]][:3])
    assert found[0] == found[1] == [json.loads(most) if most.startswith('"') else most] * 3


@pytest.mark.parametrize("most", ["007", "12", "2024-01-05", "True", "1e5", "NA", "null", "None", "nan", "n/a", " a "])
def test_csv_cells_stay_as_they_are_written(tmp_path, most):
    for name, other in (("few", ""), ("more", "x9,1\n12.5,0\n,1\n")):
        path = tmp_path / f"{name}.csv"
        path.write_text(f"text,label\n{most},0\n{most},1\n{other}")
        assert texts(path)[:2] == [most, most]


def test_a_number_is_written_alike_in_columns_of_integers_and_of_floats(tmp_path):
    for name, stars in (("ints", [4, 5]), ("floats", [4.0, None]), ("texts", ["4", "x"])):
        path = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_dict({"text": stars, "label": [0, 1]}).to_parquet(path)
        assert texts(path)[0] == "4"


def test_stated_types_are_written_by_a_stated_rule(tmp_path):
    path = tmp_path / "rows.parquet"
    row = {"text": [datetime.datetime(2024, 1, 5, 10)], "day": [datetime.date(2024, 1, 5)], "ok": [True], "label": [0]}
    datasets.Dataset.from_dict(row).to_parquet(path)
    assert texts(path, template="{text}|{day}|{ok}") == ["2024-01-05T10:00:00|2024-01-05|true"]


@pytest.mark.parametrize("value", [["a", "b"], {"role": "user"}, [{"role": "user", "content": "hi"}]])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_and_dictionaries_are_no_text(tmp_path, value, kind):
    path = tmp_path / f"rows.{kind}"
    rows = datasets.Dataset.from_list([{"text": value, "label": 0}])
    rows.to_parquet(path) if kind == "parquet" else rows.to_json(path)
    with pytest.raises(
        ValueError, match=r"column=text: it holds values of type (list|dict), which are no text; .*chat"
    ):
        texts(path)


def test_missing_cells_are_empty_or_leave_a_row_out_or_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,title,label\none,A,0\n,B,1\n"",,1\ntwo,,0\nthree,C,\n')
    template = "{title}:{text}"
    assert texts(path, template=template) == ["A:one", "B:", ":two"]
    assert texts(path, template=template, if_missing="skip") == ["A:one"]
    with pytest.raises(ValueError, match=r"if_missing=refuse: a cell is missing in title, text, label"):
        texts(path, template=template, if_missing="refuse")
    path.write_text("text,title,label\nNA,A,0\n-,B,1\n")
    assert texts(path, template=template, missing_words=["NA", "-"]) == ["A:", "B:"]


CLASSES = {
    "words": (["no", "yes"], ["no", "yes"]),
    "truth": (["True", "False"], ["false", "true"]),
    "truth for yes": (["True", "False"], ["no", "yes"]),
    "floats": (["0.0", "1.0"], ["0", "1"]),
    "codes": (["01", "1"], ["1", "01"]),
    "missing": (["1", "0", ""], ["0", "1"]),
}


@pytest.mark.parametrize(("cells", "classes"), CLASSES.values(), ids=CLASSES)
def test_classes_are_found_as_they_are_written_or_meant(tmp_path, cells, classes):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"a,{cell}\n" for cell in cells))
    expected = {"words": [0, 1], "truth": [1, 0], "truth for yes": [1, 0], "floats": [0, 1], "codes": [1, 0]}
    words = {name: f" w{index}" for index, name in enumerate(classes)}
    found = list(labels(path, label_words=words))
    assert found == expected.get(next(name for name, case in CLASSES.items() if case[0] is cells), [1, 0])


def test_classes_of_a_recipe_are_not_what_yaml_makes_of_them(write, workplace):
    from hf_dpzo.recipe.recipe import read_recipe

    path = workplace / "words.yaml"
    path.write_text(
        "model_name_or_path: none\ndata: rows.csv\nmethod: mezo\nmax_steps: 1\nexpected_batch_size: 1\nuse_cpu: yes\n"
        "label_words: {no: bad, yes: good, 01: on}\nwhere: {kind: off}\noutput_dir: out\n"
    )
    recipe, args = read_recipe(path)
    assert (recipe.labels, recipe.words) == (("no", "yes", "01"), ("bad", "good", "on"))
    assert recipe.where_values == {"kind": "off"} and args.use_cpu


def test_names_that_data_state_are_classes(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    rows.cast_column("label", datasets.ClassLabel(names=["neg", "pos"])).save_to_disk(path)
    assert labels(path, label_words={"pos": " good", "neg": " bad"}) == [0, 1]
    assert labels(path, label_words={"0": " bad", "1": " good"}) == [1, 0]


FILES = {
    "rows.tsv": b"text\tlabel\ngood,\t1\n",
    "rows.CSV": b'text,label\n"good,",1\n',
    "mark.csv": '\ufefftext,label\n"good,",1\n'.encode(),
    "rows.ndjson": b'{"text": "good,", "label": 1}\n',
    "rows.jsonl.gz": gzip.compress(b'{"text": "good,", "label": 1}\n'),
    "rows.csv.gz": gzip.compress(b'text,label\n"good,",1\n'),
    "list.json": b'[\n {"text": "good,",\n "label": 1}\n]',
    "lines.json": b'{"text": "good,", "label": 1}\n\n{"text": "b", "label": 0}\n',
    "field.json": b'{"version": "1", "data": [{"text": "good,", "label": 1}]}',
    "columns.json": b'{"text": ["good,"], "label": [1]}',
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_many_kinds_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert (texts(tmp_path / name)[0], labels(tmp_path / name)[0]) == ("good,", 1)


def test_encoding_and_separator_can_be_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text;label\ncaf\u00e9;1\n".encode("latin-1"))
    train, _ = load_tables(data_recipe(path, encoding="latin-1", separator=";"))
    assert train[0] == {"text": "caf\u00e9", "label": "1"}


def test_folders_are_read_by_their_splits(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, text in (("train", "007"), ("test", "x")):
        (folder / f"{name}.csv").write_text(f"text,label\n{text},1\n{text},1.5\n")
    train, test = load_tables(data_recipe(folder, eval_split="test"))
    assert (train["text"][0], train["label"][0], test["text"][0]) == ("007", "1", "x")


UNREADABLE = {
    "photo.xyz": (b"x", r"no reader is known for its suffix; name a file of one of the kinds .csv, .tsv, .json"),
    "rows": (b"x", "no reader is known for its suffix"),
    "latin.csv": ("text,label\ncaf\u00e9,1\n".encode("latin-1"), "not text in the encoding utf-8; set encoding"),
    "more.csv": (b"text,label\na,1\nsecret,1,2\n", r"the cells that its first row names \(line 3\); quote"),
    "first.csv": (b"text,label\nsecret,1,2\n", "the cells that its first row names"),
    "quote.csv": (b'text,label\n"secret,1\n', "the cells that its first row names"),
    "empty.csv": (b"", "the cells that its first row names"),
    "semicolon.csv": (b"text;label\na;1\n", '^template={text}: set separator: ";" .*, which stands between'),
    "commas.csv": (b"\xef\xbb\xbftext;label\na, secret;1\n", r'commas.csv: set separator: ";" .*, which stands'),
    "tabs.csv": (b"text\tlabel\na, secret\t1\n", r'tabs.csv: set separator: "\\t" .*, which stands'),
    "headless.csv": (b"The secret pump has stopped: call us,1\nb,2\n", r"no column text, only \(36 characters; does"),
    "broken.jsonl": (b'\n{"text": "b"}\n{"text": "secret"\n', "not valid JSON at line 3, column 18; mend that"),
    "broken.json": (b'[{"text": "b"},\n {"text": secret}]', "not valid JSON at line 2, column 11; mend that"),
    "lines.json": (b'{"text": "b"}\n{"text": secret}', "not valid JSON at line 2, column 10; mend that"),
    "number.jsonl": (b"5\n", "row 1 is no object"),
    "deep.json": (b"[" * 100_000, "its JSON has too many brackets"),
    "none.json": (b'{"a": {"b": 1}}', "it holds no list of rows"),
    "false.csv.gz": (b"text,label\nsecret,1\n", "is damaged"),
    "false.parquet": (b"secret", r"it can not be read as a file .parquet \(Arrow"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_can_not_be_read_gets_one_sentence_without_a_value(tmp_path, name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset_builder", None)  # Nothing that exists is looked up anywhere else.
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tables(data_recipe(tmp_path / name))
    said = str(caught.value)
    assert "secret" not in said and said.endswith(".") and "\n" not in said


def test_a_name_that_is_no_file_gets_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file"):
        load_tables(data_recipe(tmp_path / "rows.tsv"))

    def fails(*given, **options):
        raise ConnectionError("a page of details")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(ValueError, match=r"the Hub gives no split train of that name \(ConnectionError\)"):
        load_tables(data_recipe("some/name"))


def test_suffixes_are_those_of_datasets():
    """The table of suffixes is private, and may move or change."""
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    assert _EXTENSION_TO_MODULE[".parquet"] == ("parquet", {}) and _EXTENSION_TO_MODULE[".png"][0] == "imagefolder"
    assert {".csv", ".tsv", ".ndjson", ".txt", ".parquet", ".arrow", ".xml"} <= {*list_suffixes()}
    assert ".png" not in list_suffixes()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "csv.gz"])
def test_a_file_is_read_anew_when_its_bytes_change(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    for number in range(2):
        rows = datasets.Dataset.from_dict(
            {"text": [f"row {index}" for index in range(number, 9)], "label": [0] * (9 - number)}
        )
        if kind == "parquet":
            rows.to_parquet(path)
        elif kind == "jsonl":
            rows.to_json(path)
        else:
            text = "text,label\n" + "".join(f"{row},0\n" for row in rows["text"])
            path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
        os.utime(path, ns=(10**18, 10**18))
        assert texts(path)[0] == f"row {number}"


def split(tmp_path, count, **changes):
    path = tmp_path / f"{count}.csv"
    path.write_text("text,label,user\n" + "".join(f"row {index},0,u{index % 60}\n" for index in range(count)))
    column = changes.pop("unit_column", None)
    train, evaluation = load_tables(data_recipe(path, **changes), unit_column=column)
    return {*train["text"]}, {*evaluation["text"]}


def test_one_row_more_moves_one_training_row(tmp_path):
    moved = []
    for count in range(300, 312):
        (train, held_out), (more, _) = (split(tmp_path, n, eval_rows=100) for n in (count, count + 1))
        assert len(held_out) == 100 and not train & held_out
        assert train <= more and len(more - train) == 1
        moved.append(more - train != {f"row {count}"})
    assert any(moved) and not all(moved)  # Both ways of being a neighbour are met.


def test_with_a_share_no_row_moves_another(tmp_path):
    (train, held_out), (more, more_held) = (split(tmp_path, n, eval_share=0.2) for n in (1000, 1010))
    assert train <= more and held_out <= more_held and 150 < len(held_out) < 250


@pytest.mark.parametrize("held", [{"eval_rows": 100}, {"eval_share": 0.1}])
def test_a_share_of_training_rows_moves_no_held_out_row_and_grows_by_at_most_one(held, tmp_path):
    grown = []
    for count in range(1000, 1012):
        train, held_out = split(tmp_path, count, **held)
        (some, same), (more, _) = (split(tmp_path, n, **held, train_share=0.4) for n in (count, count + 1))
        assert same == held_out and some <= train and 0.3 < len(some) / len(train) < 0.5
        assert some <= more and len(more - some) <= 1
        grown.append(len(more - some))
    assert {*grown} == {0, 1}  # Both ways of being a neighbour are met.


def test_a_share_that_leaves_no_training_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_share=1e-09: it leaves no row to train on; raise it"):
        split(tmp_path, 10, eval_rows=2, train_share=1e-9)


def test_one_unit_more_moves_one_unit(tmp_path):
    (train, held_out), (more, _) = (split(tmp_path, n, eval_rows=20, unit_column="user") for n in (55, 56))
    assert len(held_out) == 20 and train <= more and len(more - train) == 1
    train, held_out = split(tmp_path, 600, eval_rows=20, unit_column="user")
    users = [{int(text.split()[1]) % 60 for text in side} for side in (train, held_out)]
    assert len(users[1]) == 20 and not users[0] & users[1]


def test_the_seed_of_the_split_chooses_other_rows(tmp_path):
    assert split(tmp_path, 100, eval_rows=20)[1] != split(tmp_path, 100, eval_rows=20, split_seed=1)[1]


def test_types_and_missing_columns_move_no_row(tmp_path):
    """A row is held out by what it holds, not by the type that its column has because of others."""
    path, other = tmp_path / "rows.parquet", tmp_path / "other.parquet"
    rows = {"text": [f"row {index}" for index in range(50)], "label": [0] * 50, "stars": [*range(50)]}
    datasets.Dataset.from_dict(rows).to_parquet(path)
    rows |= {"stars": [float(star) for star in rows["stars"]], "note": [None] * 50}
    datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.Value("float64"),
                "stars": datasets.Value("float64"),
                "note": datasets.Value("string"),
            }
        ),
    ).to_parquet(other)
    held_out = [[*load_tables(data_recipe(name, eval_rows=20))[1]["text"]] for name in (path, other)]
    assert held_out[0] == held_out[1]
