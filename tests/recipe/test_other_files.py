"""A file that is no recipe, such as the private table itself, is refused without a word of what it holds."""

import pytest

from support.recipes import refused


# Each is no YAML for another reason, or YAML by chance, and has a private word in the place that a parser would quote.
PRIVATE_TEXTS = [
    "note,urgent\nThe pump of Smith : it 's broken : call,yes\n",
    "note: *Smith\n",
    "note: !Smith x\n",
    "note: &Smith 1\nmore: &Smith 2\n",
    'note: "\\Smith"\n',
    "when: 2024-99-99\nnote: Smith\n",
    "!!int Smith\n",
    "? [Smith]\n: 1\n",
    "!!set {Smith}\n",
    "note: [Smith\n",
    "%Smith\n",
    "Smith: the pump has stopped\n",
    "data: rows.csv\nSmith, please call: yes\n",
    "Smith says hello\n",
    "Smith\x00\n",
]


@pytest.mark.parametrize("text", PRIVATE_TEXTS)
@pytest.mark.parametrize("command", ["plan", "tune"])
def test_no_error_of_a_recipe_shows_what_is_in_the_file(workplace, capsys, command, text):
    (workplace / "notes.txt").write_text(text)
    said = refused(capsys, command, str(workplace / "notes.txt"))
    assert said.startswith("recipe=") and "Smith" not in said


def test_an_error_of_yaml_says_where_and_of_what_kind(workplace, capsys):
    (workplace / "broken.yaml").write_text("data: rows.csv\nnote: it is: so\n")
    said = refused(capsys, "plan", str(workplace / "broken.yaml"))
    assert "it is not valid YAML in line 2, column 12 (mapping values are not allowed here); correct it" in said


@pytest.mark.parametrize("suffix", ["csv", "TSV", "jsonl", "parquet", "xlsx", "csv.gz"])
def test_a_table_is_no_recipe(workplace, capsys, suffix):
    (workplace / f"notes.{suffix}").write_bytes(b"data: Smith\n")
    said = refused(capsys, "train", str(workplace / f"notes.{suffix}"))
    assert "a table ends like that" in said and "Smith" not in said


def test_a_folder_is_no_recipe(workplace, capsys):
    assert "it is a folder; name the YAML file" in refused(capsys, "plan", str(workplace))
