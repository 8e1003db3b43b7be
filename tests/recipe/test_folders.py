"""Folders of rows: read whole, or refused by a sentence, and never looked for anywhere else."""

import datasets
import pytest

from hf_dpzo.recipe.tables import load_tables

from support.data_recipes import data_recipe


ROWS = {
    "csv": "text,label\na,1\n",
    "tsv": "text\tlabel\na\t1\n",
    "jsonl": '{"text": "a", "label": 1}\n',
    "txt": "a\n",
    "md": "a\n",
}


def folder(tmp_path, names):
    path = tmp_path / "rows"
    path.mkdir()
    for name in names:
        (path / name).write_text(ROWS[name.split(".")[-1]])
    return path


@pytest.mark.parametrize("names", [("a.csv", "b.jsonl"), ("train.csv", "train.tsv"), ("a.csv", "b.csv", "c.txt")])
def test_folders_of_several_kinds_are_refused(tmp_path, names):
    kinds = ", ".join(sorted({name[name.index(".") :] for name in names}))
    with pytest.raises(
        ValueError, match=f"the split train has files of the kinds {kinds}; name one of them, or a"
    ) as got:
        load_tables(data_recipe(folder(tmp_path, names)))
    assert got.value.__cause__ is None


@pytest.mark.parametrize(
    "names", [("a.csv", "b.csv"), ("train.csv", "LICENSE.txt"), ("a.csv", "README.md", "notes.md")]
)
def test_folders_of_one_kind_are_read_whole(tmp_path, names):
    rows, _ = load_tables(data_recipe(folder(tmp_path, names)))
    assert len(rows) == sum(name.endswith("csv") for name in names)


def test_a_folder_may_say_which_files_it_consists_of(tmp_path):
    path = folder(tmp_path, ("a.csv", "b.jsonl"))
    (path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n")
    assert len(load_tables(data_recipe(path))[0]) == 1


@pytest.mark.parametrize("saved", [True, False])
def test_a_folder_is_never_a_name_on_the_hub(tmp_path, monkeypatch, saved):
    """`datasets` looks for a relative path that it does not find, which would tell what the data are called."""
    monkeypatch.chdir(tmp_path)
    if saved:
        rows = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
        datasets.DatasetDict({"test": rows}).save_to_disk("rows")
    else:
        (tmp_path / "rows").mkdir()

    def fails(*given, **options):
        raise AssertionError("looked up")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fails)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", fails)
    monkeypatch.setattr("datasets.load.HfFileSystem", fails, raising=False)
    with pytest.raises(ValueError, match="it has no split train; name" if saved else "it holds no train split"):
        load_tables(data_recipe("rows"))
