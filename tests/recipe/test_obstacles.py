"""What is in the way of a run is said before its model is loaded, in one sentence each."""

import inspect
import signal

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from transformers.trainer_utils import align_special_tokens

from hf_dpzo import ZOTrainer
from hf_dpzo.cli.main import main
from hf_dpzo.cli.quiet import _TOKENIZER_MESSAGE
from hf_dpzo.models import hub, precision
from hf_dpzo.recipe import loading, obstacles, run
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


@pytest.mark.parametrize("command", ["plan", "tune"])
def test_a_missing_library_is_said_by_this_library_alone(write, capsys, monkeypatch, command):
    monkeypatch.setattr(obstacles, "is_gguf_available", lambda: False)
    monkeypatch.setattr(
        loading.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("stock says it at length")
    )
    assert refused(capsys, command, write(gguf_file="m.gguf")).startswith("gguf_file=m.gguf: reading it needs gguf")


def test_so_is_a_missing_token_of_the_hub(write, capsys, nothing_loads, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "there is no access token of the Hub; run hf auth login" in refused(capsys, "train", write(push_to_hub=True))


def answer(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


# What the Hub answers to who this is, and to a repository that is opened, and what is said of it.
HUBS = {
    "offline": (httpx.ConnectError("[Errno -2]"), None, "the Hub cannot be reached (ConnectError); check the network"),
    "slow": (httpx.ReadTimeout("late"), None, "the Hub cannot be reached (ReadTimeout); check the network"),
    "unknown": (answer(401), None, "the Hub does not take this token; run hf auth login"),
    "reads": ({"auth": {"accessToken": {"role": "read"}}}, None, "this token may only read; run hf auth login with"),
    "foreign": ({}, answer(403), "hub_model_id=other/notes: this token may not write there; run hf auth login"),
    "broken": ({}, httpx.ConnectError("gone"), "hub_model_id=other/notes: the Hub cannot be reached (ConnectError)"),
}


def answering(monkeypatch, **answers) -> None:
    def build(found):
        def call(*_, **__):
            if isinstance(found, Exception):
                raise found
            return found

        return call

    monkeypatch.setattr(hub, "get_token", lambda: "hf_a")
    for name, found in answers.items():
        monkeypatch.setattr(hub.HfApi, name, build(found))


@pytest.mark.parametrize("name", HUBS)
def test_a_hub_that_cannot_be_pushed_to_is_one_sentence_before_a_model_is_loaded(write, capsys, monkeypatch, name):
    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("it was loaded before it was refused"))
    user, repository, sentence = HUBS[name]
    answering(monkeypatch, whoami=user, create_repo=repository)
    assert sentence in refused(capsys, "train", write(push_to_hub=True, hub_model_id="other/notes"))


def test_with_a_token_that_writes_nothing_is_in_the_way_and_a_plan_makes_no_repository(write, monkeypatch, capsys):
    answering(monkeypatch, whoami={"auth": {"accessToken": {"role": "write"}}}, create_repo=AssertionError("made"))
    assert list_obstacles(*read_recipe(write(push_to_hub=True))) == []
    answering(monkeypatch, whoami=answer(403))  # A token of one repository.
    assert list_obstacles(*read_recipe(write(push_to_hub=True))) == []
    assert main(["plan", write(push_to_hub=True)]) == 0


@pytest.mark.parametrize("error", [httpx.ConnectError("[Errno -2]"), answer(500), OfflineModeIsEnabled("off")])
def test_an_error_of_the_hub_from_anywhere_is_one_sentence(write, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(run, "load_tokenizer", fail)
    assert refused(capsys, "train", write()).startswith("Hub: ")


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


NUMBERS = {
    "target_delta=0.1: with 70 rows it would allow one to be published whole; choose at most 1e-03.": {
        "target_delta": 0.1
    },
    "expected_batch_size=71: the training data have 70 rows; lower it.": {"expected_batch_size": 71},
    "privacy_unit_column=nobody:": {"privacy_unit_column": "nobody"},
}


@pytest.mark.parametrize("sentence", NUMBERS)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_numbers_that_do_not_suit_the_rows_are_refused_before_a_model_is_loaded(
    write, capsys, monkeypatch, command, sentence
):
    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("it was loaded before it was refused"))
    assert refused(capsys, command, write(**NUMBERS[sentence])).startswith(sentence)


def test_nothing_is_loading_before_the_last_refusal_that_needs_no_model(write, workplace, capsys):
    assert main(["train", write(target_delta=0.1)]) == 2
    assert "loading the model" not in capsys.readouterr().err
    assert main(["train", write(eval_rows="absent", max_steps=1)]) == 0
    said = capsys.readouterr().err
    assert said.count("hf-dpzo: loading the model") == 1
    assert "PAD/BOS/EOS" not in said and "1/1" not in said.replace("step", "")


def test_stock_still_says_what_is_left_out():
    assert _TOKENIZER_MESSAGE in inspect.getsource(align_special_tokens)


def test_a_plan_that_is_told_to_end_leaves_no_folder(write, workplace, monkeypatch):
    def end(*_, **__):
        (workplace / "out").mkdir()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run, "load_model", end)
    with pytest.raises(SystemExit):
        main(["plan", write()])
    assert not (workplace / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
