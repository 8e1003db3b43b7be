"""The stand-in for the Hub: the stock client, Trainer and PEFT work with it, and fail as they do with the Hub."""

import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, hf_api, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.hub import hf_api as transformers_api

from support import local_hub
from support.local_hub import TOKEN, TRIES, LocalHub, point_at
from support.models import classifier, with_lora


REPO = "tester/x"
COMMIT = "POST /api/models/tester/x/commit/main"
hub = local_hub.hub


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "logs").mkdir(parents=True)
    (path / "weights.bin").write_bytes(b"first")
    (path / "logs" / "one.txt").write_text("1")
    return path


@pytest.fixture
def pushed(hub, folder):
    """The hub, with `folder` in a repository."""
    huggingface_hub.create_repo(REPO)
    huggingface_hub.upload_folder(repo_id=REPO, folder_path=folder, commit_message="first push")
    hub.requests.clear()
    return hub


def push(folder, **options):
    return huggingface_hub.upload_folder(repo_id=REPO, folder_path=folder, **options)


class OneAfterAnother(TrainerCallback):
    """A step waits for the push before it, as it would replace the files that the stock Trainer reads late."""

    def on_save(self, args, state, control, **kwargs):
        self.trainer._finish_current_push()


def stock_trainer(model, folder, **changes) -> Trainer:
    """A stock run of two steps that pushes after each."""
    settings = {
        "output_dir": str(folder / "x"),
        "max_steps": 2,
        "save_steps": 1,
        "push_to_hub": True,
        "hub_strategy": "every_save",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    rows = [{"input_ids": [5, 6, 7], "labels": i % 2} for i in range(16)]
    waits = OneAfterAnother()
    arguments = TrainingArguments(**{**settings, **changes})
    waits.trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[waits])
    return waits.trainer


def same_weights(one, other) -> bool:
    others = other.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


def test_new_repository_has_one_commit(hub):
    assert huggingface_hub.create_repo("x").repo_id == REPO
    assert huggingface_hub.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert [(one.message, one.changed) for one in hub.commits(REPO)] == [("initial commit", (".gitattributes",))]
    with pytest.raises(HfHubHTTPError, match="409"):
        huggingface_hub.create_repo(REPO)


def test_commits_hold_the_whole_tree_and_what_changed(pushed, folder):
    (folder / "weights.bin").write_bytes(b"second")
    answer = push(folder, commit_message="second push")
    _, first, second = pushed.commits(REPO)
    assert (first.message, first.changed) == ("first push", ("logs/one.txt", "weights.bin"))
    assert (second.message, second.changed, second.oid) == ("second push", ("weights.bin",), answer.oid)
    assert {**second.files, "weights.bin": b"first"} == first.files
    assert set(first.files) == {".gitattributes", "logs/one.txt", "weights.bin"}


def test_pushes_in_the_background_come_in_order(pushed, folder):
    jobs = [
        huggingface_hub.upload_file(repo_id=REPO, path_or_fileobj=b"%d" % i, path_in_repo="i", run_as_future=True)
        for i in range(3)
    ]
    (folder / "weights.bin").write_bytes(b"second")
    jobs.append(push(folder, run_as_future=True))
    assert [job.result().oid for job in jobs] == [one.oid for one in pushed.commits(REPO)[2:]]
    assert [one.files["i"] for one in pushed.commits(REPO)[2:]] == [b"0", b"1", b"2", b"2"]


def test_nothing_is_committed_where_nothing_changed(pushed, folder):
    assert push(folder).oid == pushed.commits(REPO)[-1].oid
    assert len(pushed.commits(REPO)) == 2
    assert pushed.requests == ["POST /api/models/tester/x/preupload/main", "GET /api/models/tester/x/revision/main"]


def test_delete_patterns_remove_what_the_folder_lacks(pushed, folder):
    (folder / "logs" / "one.txt").unlink()
    push(folder, delete_patterns="*")
    assert pushed.commits(REPO)[-1].changed == ("logs/one.txt",)
    assert set(pushed.commits(REPO)[-1].files) == {".gitattributes", "weights.bin"}
    assert pushed.requests[0] == "GET /api/models/tester/x/tree/main?recursive=true&expand=false"


def test_files_that_gitignore_names_are_not_committed(pushed, folder):
    (folder / ".gitignore").write_text("*.log\n")
    (folder / "secret.log").write_text("1")
    push(folder)
    assert pushed.commits(REPO)[-1].changed == (".gitignore",)


def test_each_commit_stays_readable(pushed):
    _, first = pushed.commits(REPO)
    second = pushed.edit(REPO, "weights.bin", b"an attacker's")

    def read(revision):
        with open(hf_hub_download(REPO, "weights.bin", revision=revision), "rb") as file:
            return file.read()

    assert (read(first.oid), read(second.oid), read("main")) == (b"first", b"an attacker's", b"an attacker's")


def test_information_about_a_revision_has_sizes(pushed):
    first = pushed.commits(REPO)[-1]
    pushed.edit(REPO, "weights.bin", b"longer than before")

    def sizes(**options):
        info = HfApi().model_info(REPO, **options)
        return info.sha, {one.rfilename: one.size for one in info.siblings}["weights.bin"]

    assert sizes(files_metadata=True, revision=first.oid) == (first.oid, 5)
    assert sizes(files_metadata=True) == (pushed.commits(REPO)[-1].oid, 18)
    assert sizes() == (pushed.commits(REPO)[-1].oid, None)


def test_tree_is_listed_by_folder(pushed):
    assert huggingface_hub.list_repo_files(REPO) == [".gitattributes", "logs/one.txt", "weights.bin"]
    assert {one.path for one in huggingface_hub.list_repo_tree(REPO)} == {".gitattributes", "logs", "weights.bin"}
    assert [one.path for one in huggingface_hub.list_repo_tree(REPO, "logs")] == ["logs/one.txt"]
    with pytest.raises(EntryNotFoundError):
        list(huggingface_hub.list_repo_tree(REPO, "missing"))


def test_snapshot_holds_the_files_of_a_commit(pushed, tmp_path):
    first = pushed.commits(REPO)[-1]
    pushed.edit(REPO, "logs/one.txt", None)
    path = snapshot_download(REPO, revision=first.oid, local_dir=tmp_path / "copy")
    files = {name: data for name, data in first.files.items() if os.path.isfile(os.path.join(path, name))}
    assert files == first.files
    assert not os.path.exists(os.path.join(snapshot_download(REPO), "logs"))


def test_kinds_of_missing_things_are_distinguished(pushed):
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "weights.bin", revision="0" * 40)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("tester/missing", "weights.bin")
    assert huggingface_hub.file_exists(REPO, "weights.bin")
    assert not huggingface_hub.file_exists(REPO, "missing.json")
    assert not huggingface_hub.repo_exists("tester/missing")


def test_writing_needs_the_token(pushed, folder):
    (folder / "weights.bin").write_bytes(b"second")
    for token in (False, "hf_wrong"):
        with pytest.raises(HfHubHTTPError, match="401"):
            push(folder, token=token)
        with pytest.raises(HfHubHTTPError, match="401"):
            huggingface_hub.create_repo("tester/y", token=token)
    assert len(pushed.commits(REPO)) == 2
    assert HfApi(token=False).model_info(REPO).id == REPO
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").model_info(REPO)
    assert huggingface_hub.whoami()["name"] == "tester"


def test_commits_that_fail_are_sent_again(pushed, folder):
    (folder / "weights.bin").write_bytes(b"second")
    pushed.fail_next(TRIES - 1)
    push(folder)
    assert len(pushed.commits(REPO)) == 3
    assert pushed.requests.count(COMMIT) == TRIES


@pytest.mark.parametrize(("failures", "status"), [(TRIES, 500), (1, 403)])
def test_commits_that_fail_for_good_change_nothing(pushed, folder, failures, status):
    (folder / "weights.bin").write_bytes(b"second")
    pushed.fail_next(failures, status)
    with pytest.raises(HfHubHTTPError, match=str(status)):
        push(folder)
    assert len(pushed.commits(REPO)) == 2
    assert pushed.requests.count(COMMIT) == failures


def test_commits_upon_another_commit_are_refused(pushed, folder):
    first = pushed.commits(REPO)[-1]
    pushed.edit(REPO, "weights.bin", b"an attacker's")
    (folder / "weights.bin").write_bytes(b"second")
    with pytest.raises(HfHubHTTPError, match="412"):
        push(folder, parent_commit=first.oid)
    assert pushed.commits(REPO)[-1].files["weights.bin"] == b"an attacker's"


def test_cards_are_read_back_and_checked(pushed, folder):
    (folder / "README.md").write_text("---\nbase_model: some/model\nepsilon: 1.5\n---\nText.\n")
    push(folder)
    assert ModelCard.load(REPO).data["epsilon"] == 1.5
    for base in ("/home/me/model", "./model", "''"):
        (folder / "README.md").write_text(f"---\nbase_model: {base}\n---\nText.\n")
        with pytest.raises(ValueError, match="base_model"):
            push(folder)
    (folder / "README.md").write_text("---\na: [\n---\nText.\n")
    with pytest.raises(ValueError, match="Invalid metadata"):
        push(folder)
    (folder / "README.md").write_text("Text.\n")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        push(folder)


def test_models_and_adapters_are_loaded_back(hub):
    model = classifier()
    model.push_to_hub(REPO)
    first = hub.commits(REPO)[-1].oid
    loaded = AutoModelForSequenceClassification.from_pretrained(REPO)
    assert same_weights(model, loaded)

    adapted = with_lora(loaded)
    torch.nn.init.ones_(adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    adapted.push_to_hub("tester/adapter")
    again = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(REPO), "tester/adapter")
    assert same_weights(adapted, again)

    with torch.no_grad():
        model.score.weight.add_(1)
    model.push_to_hub(REPO)
    at_first = AutoModelForSequenceClassification.from_pretrained(REPO, revision=first)
    assert not same_weights(model, at_first)
    assert same_weights(model, AutoModelForSequenceClassification.from_pretrained(REPO))


def test_stock_trainer_pushes_at_each_save_without_a_card(hub, tmp_path):
    trainer = stock_trainer(classifier(), tmp_path)
    trainer.train()
    step = ["POST /api/models/tester/x/preupload/main", COMMIT]
    assert hub.requests == ["POST /api/repos/create", *step, *step]
    trainer.push_to_hub()
    assert hub.requests[5:] == ["POST /api/validate-yaml", *step]
    assert [(one.message, one.changed) for one in hub.commits(REPO)[1:]] == [
        ("Training in progress, step 1", ("config.json", "model.safetensors", "training_args.bin")),
        ("Training in progress, step 2", ("model.safetensors",)),
        ("End of training", ("README.md",)),
    ]
    assert same_weights(trainer.model, AutoModelForSequenceClassification.from_pretrained(REPO))


def test_stock_trainer_passes_over_a_push_that_fails(hub, tmp_path):
    trainer = stock_trainer(classifier(), tmp_path, max_steps=1)
    hub.fail_next(TRIES)
    trainer.train()
    assert len(hub.commits(REPO)) == 1
    assert hub.requests.count(COMMIT) == TRIES


def test_stock_card_of_an_adapter_on_a_model_without_a_name_is_refused(hub, tmp_path):
    trainer = stock_trainer(with_lora(classifier()), tmp_path)
    trainer.train()
    weights = ("adapter_config.json", "adapter_model.safetensors", "training_args.bin")
    assert [one.changed for one in hub.commits(REPO)[1:]] == [weights, ("adapter_model.safetensors",)]
    with pytest.raises(ValueError, match='"base_model" with value ""'):
        trainer.push_to_hub()


def test_another_process_talks_to_the_hub(tmp_path):
    code = """
import huggingface_hub
huggingface_hub.create_repo("x")
huggingface_hub.upload_file(repo_id="tester/x", path_or_fileobj=b"1", path_in_repo="one")
"""
    with LocalHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
        assert hub.commits(REPO)[-1].files["one"] == b"1"


def test_the_client_reaches_no_other_server(hub):
    with pytest.raises(httpx.UnsupportedProtocol):
        HfApi(endpoint="http://127.0.0.1:1").model_info(REPO)
    assert hub.gaps == ["GET http://127.0.0.1:1/api/models/tester/x: not the hub"]
    hub.gaps.clear()


def test_requests_without_an_answer_are_kept(pushed):
    with pytest.raises(HfHubHTTPError, match="501"):
        huggingface_hub.list_repo_refs(REPO)
    assert len(pushed.gaps) == 1
    pushed.gaps.clear()


def test_everything_is_undone(tmp_path):
    def state():
        read = {name: getattr(constants, name) for name in dir(constants) if name.isupper()}
        return read, dict(os.environ), hf_api.api.endpoint, transformers_api().endpoint

    before = state()
    with LocalHub() as hub, pytest.MonkeyPatch.context() as patch:
        point_at(hub, tmp_path, patch)
        assert hf_api.api.endpoint == transformers_api().endpoint == constants.ENDPOINT == hub.endpoint
        assert huggingface_hub.get_token() == TOKEN
        assert state() != before
    assert state() == before
