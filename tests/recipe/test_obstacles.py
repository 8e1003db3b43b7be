"""What is in the way of a run is said before its model is loaded, in one sentence each."""

import pytest

from hf_dpzo import ZOTrainer
from hf_dpzo.cli.main import main
from hf_dpzo.models import precision
from hf_dpzo.recipe import obstacles, run
from hf_dpzo.recipe.obstacles import list_obstacles
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.trajectory.log import LOG_FILE

from support.models import one_layer
from support.recipes import refused
from support.rows import labelled_rows


@pytest.fixture
def nothing_loads(monkeypatch):
    """The first call that a run makes to load anything fails."""
    monkeypatch.setattr(run, "load_tokenizer", lambda *_: pytest.fail("it was loaded before it was refused"))


def occupy(workplace) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / LOG_FILE).write_bytes(b"a run")


MISSING_TRACKERS = {
    "wandb": "report_to=wandb: WandbCallback requires wandb to be installed.",
    "flyte": "report_to=flyte: FlyteCallback requires flytekit to be installed.",
    "nobody": "report_to=nobody: there is no such tracker, only azure_ml",
}


@pytest.mark.parametrize("name", MISSING_TRACKERS)
def test_a_missing_tracker_is_one_sentence_before_a_model_is_loaded(write, capsys, nothing_loads, name):
    assert refused(capsys, "train", write(), "--report_to", name).startswith(MISSING_TRACKERS[name])


def test_a_missing_tracker_is_one_sentence_in_python(make_args):
    with pytest.raises(ValueError, match=r"^report_to=wandb: .* set report_to=none\.$"):
        ZOTrainer(model=one_layer(), args=make_args(report_to=["wandb"]), train_dataset=labelled_rows(16))


def test_an_occupied_folder_is_refused_before_a_model_is_loaded(write, workplace, capsys, nothing_loads):
    occupy(workplace)
    assert "it holds the log of a run; go on with that by resume" in refused(capsys, "train", write())


def test_so_are_a_missing_run_a_file_and_a_link(write, workplace, capsys, nothing_loads):
    resumed = refused(capsys, "train", write(), "--resume_from_checkpoint", "true")
    assert "holds no log of a run" in resumed
    file = refused(capsys, "train", write(output_dir=str(workplace / "rows.csv" / "out")))
    assert "rows.csv is no folder; choose another" in file
    (workplace / "out").mkdir()
    (workplace / "out" / "README.md").symlink_to(workplace / "rows.csv")
    assert "it is a link" in refused(capsys, "train", write())


def test_so_are_missing_libraries_and_missing_earlier_runs(write, capsys, nothing_loads, monkeypatch):
    monkeypatch.setattr(obstacles, "is_gguf_available", lambda: False)
    monkeypatch.setattr(precision, "is_torchao_available", lambda: False)
    assert "reading it needs gguf, which is missing" in refused(capsys, "train", write(gguf_file="m.gguf"))
    assert "pip install torchao" in refused(capsys, "train", write(quantization="int8"))
    assert "nowhere" in refused(capsys, "train", write(), "--earlier_runs", "nowhere")


def test_so_is_a_missing_token_of_the_hub(write, capsys, nothing_loads, monkeypatch):
    monkeypatch.setattr(obstacles, "get_token", lambda: None)
    assert "there is no access token of the Hub; run hf auth login" in refused(capsys, "train", write(push_to_hub=True))
    monkeypatch.setattr(obstacles, "get_token", lambda: "hf_a")
    assert list_obstacles(*read_recipe(write(push_to_hub=True))) == []


def test_everything_in_the_way_is_listed_and_nothing_is_written(write, workplace):
    occupy(workplace)
    recipe, args = read_recipe(write(), ["--report_to", "wandb"])
    before = sorted(workplace.rglob("*"))
    found = list_obstacles(recipe, args)
    assert [sentence.partition("=")[0] for sentence in found] == ["output_dir", "report_to"]
    assert sorted(workplace.rglob("*")) == before


def test_nothing_is_in_the_way_of_a_run_that_begins(write):
    assert list_obstacles(*read_recipe(write())) == []
    assert main(["train", write(max_steps=1, eval_rows="absent")]) == 0
