"""Pushing: every commit with weights carries the guarantee and the log that belong to it, and nothing else."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainerCallback

import hf_dpzo
from hf_dpzo import ZOTrainer, ZOTrainingArguments, seeded_peft_model
from hf_dpzo.cli.main import main
from hf_dpzo.recipe.tasks.metrics import compute_accuracy
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.verification.verify import verify
from hf_dpzo.zo.directions import Rademacher
from hf_dpzo.zo.optimizer import ZOOptimizer

from support.local_hub import TOKEN
from support.models import classifier
from support.rows import labelled_rows
from support.runs import SHORT_RUN


REPO, BASE, STEPS = "tester/private", "tester/base", 4

ALWAYS = {"README.md", "privacy.json", "trajectory.zo"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
FULL = {"config.json", "model.safetensors"}
BESIDE = {"initial.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def on_hub(hub, tokenizer, tmp_path):
    """A hub that has the base model."""
    torch.manual_seed(0)
    classifier().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    huggingface_hub.create_repo(BASE)
    huggingface_hub.upload_folder(repo_id=BASE, folder_path=tmp_path / "base")
    return hub


@pytest.fixture
def make_trainer(on_hub, tokenizer, tmp_path):
    def make(*, lora: bool = True, callbacks=None, **changes) -> ZOTrainer:
        settings = {
            "output_dir": str(tmp_path / "private"),
            **SHORT_RUN,
            "max_steps": STEPS,
            "push_to_hub": True,
        }
        model = AutoModelForSequenceClassification.from_pretrained(BASE)
        if lora:
            config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj", "v_proj"])
            model = seeded_peft_model(model, config, seed=1)
        return ZOTrainer(
            model=model,
            args=ZOTrainingArguments(**{**settings, **changes}),
            train_dataset=labelled_rows(40),
            eval_dataset=labelled_rows(8, seed=1),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_accuracy,
            callbacks=callbacks,
        )

    return make


def commits(on_hub):
    """Those after the first, which the Hub makes."""
    return on_hub.commits(REPO)[1:]


def has_weights(files) -> bool:
    return any(name.endswith("model.safetensors") for name in files)


class OneAfterAnother(TrainerCallback):
    """Each push ends before the next step, so that there is one commit for each checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        self.trainer._finish_current_push()


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "all parameters"])
def test_every_commit_carries_its_card_statement_and_log(make_trainer, on_hub, lora, tmp_path):
    waiter = OneAfterAnother()
    trainer = make_trainer(lora=lora, callbacks=[waiter], save_strategy="steps", save_steps=1)
    waiter.trainer = trainer
    trainer.train()
    trainer.push_to_hub(license="mit", dataset="imdb")
    found = commits(on_hub)
    assert [one.message for one in found] == [
        *(f"Training in progress, step {step}" for step in range(1, STEPS + 1)),
        "End of training",
    ]
    for step, one in zip([1, 2, 3, 4, 4], found, strict=True):
        assert set(one.files) - {".gitattributes"} == ALWAYS | BESIDE | (ADAPTER if lora else FULL)
        said = json.loads(one.files["privacy.json"])
        assert said["claim"]["steps_taken"] == said["reproducibility"]["weights"]["after_step"] == step
        for finding in verify(REPO, revision=one.oid):
            assert finding.holds, (step, finding)
    assert ModelCard.load(REPO).data.license == "mit"


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "all parameters"])
def test_what_was_pushed_loads_back_and_verifies(make_trainer, on_hub, lora):
    trainer = make_trainer(lora=lora)
    trainer.train()
    trainer.save_model()  # As stock, this pushes.
    loader = AutoPeftModelForSequenceClassification if lora else AutoModelForSequenceClassification
    loaded = loader.from_pretrained(REPO).eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)
    assert main(["verify", REPO]) == 0
    card = ModelCard.load(REPO)
    assert card.data.base_model == BASE
    assert card.data.pipeline_tag == "text-classification"
    assert f"hf-dpzo verify {REPO}" in card.text


def test_no_commit_holds_a_secret_or_a_superfluous_file(make_trainer, on_hub, tmp_path):
    folder = tmp_path / "private"
    folder.mkdir()
    for name in ("secrets.txt", "train_results.json", "runs/events", "_dpzo_private/key", "losses.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raw losses and hf_secret")
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_metrics("train", {"train_loss": 1.0})
    trainer.save_state()
    trainer.push_to_hub()
    for one in commits(on_hub):
        assert set(one.files) - {".gitattributes"} == ALWAYS | BESIDE | ADAPTER
        for name, data in one.files.items():
            assert TOKEN.encode() not in data and b"hf_secret" not in data and b"train_loss" not in data, name


def test_strategy_end_pushes_once(make_trainer, on_hub):
    trainer = make_trainer(hub_strategy="end", save_strategy="steps", save_steps=1)
    trainer.train()
    assert commits(on_hub) == []
    trainer.push_to_hub()
    (only,) = commits(on_hub)
    assert set(only.files) >= ALWAYS | ADAPTER


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_upload_checkpoints_are_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match=f"hub_strategy={strategy}: a run goes on from the log"):
        ZOTrainingArguments(
            output_dir=str(tmp_path),
            noise_multiplier=1.0,
            target_delta=1e-5,
            push_to_hub=True,
            hub_strategy=strategy,
            use_cpu=True,
        )


def test_steps_while_a_push_runs_do_not_reach_into_its_commit(make_trainer, on_hub):
    """Pushes run in the background; what they carry was copied before the next step."""
    trainer = make_trainer(save_strategy="steps", save_steps=1, hub_always_push=True, save_total_limit=1)
    trainer.train()
    trainer._finish_current_push()
    for one in commits(on_hub):
        assert all(finding.holds for finding in verify(REPO, revision=one.oid))
    assert len(commits(on_hub)) == STEPS


def test_a_push_that_fails_ends_no_run(make_trainer, on_hub, caplog):
    on_hub.fail_next(1000)
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    trainer._finish_current_push()
    assert "A push to the Hub failed" in caplog.text
    on_hub.fail_next(0)
    trainer.push_to_hub()
    assert all(finding.holds for finding in verify(REPO))
    assert not list(Path(trainer.args.output_dir).glob("_push-*"))


def test_a_last_push_that_fails_raises_and_loses_nothing(make_trainer, on_hub):
    trainer = make_trainer(hub_strategy="end")
    trainer.train()
    on_hub.fail_next(1000)
    with pytest.raises(HfHubHTTPError):
        trainer.save_model()
    on_hub.fail_next(0)
    folder = Path(trainer.args.output_dir)
    assert {path.name for path in folder.iterdir()} >= ALWAYS | ADAPTER
    assert trainer.push_to_hub().oid


def test_nothing_is_pushed_before_anything_was_trained(make_trainer, on_hub):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="push_to_hub: nothing was trained"):
        trainer.push_to_hub()
    trainer.save_model()
    assert commits(on_hub) == []


def test_weights_of_an_earlier_model_do_not_stay(make_trainer, on_hub, tmp_path):
    full = make_trainer(lora=False, output_dir=str(tmp_path / "full"), hub_model_id=REPO)
    full.train()
    full.push_to_hub()
    trainer = make_trainer(hub_model_id=REPO)
    trainer.train()
    trainer.push_to_hub()
    assert "model.safetensors" not in commits(on_hub)[-1].files
    assert "adapter_model.safetensors" in commits(on_hub)[-1].files


def test_what_lay_in_the_folders_before_is_not_pushed(make_trainer, on_hub, tmp_path):
    """As of an earlier run, which was not private."""
    for step in (2, 4):
        folder = tmp_path / "private" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "rows.txt", "predictions.json"):
            (folder / name).write_text("raw")
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    trainer._finish_current_push()
    for one in commits(on_hub):
        assert set(one.files) - {".gitattributes"} == ALWAYS | BESIDE | ADAPTER


def test_what_an_earlier_model_left_on_the_hub_goes(make_trainer, on_hub):
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "config.json", "notes.md"):
        huggingface_hub.create_repo(REPO, exist_ok=True)
        on_hub.edit(REPO, name, b"{}")
    trainer = make_trainer()
    trainer.train()
    trainer.push_to_hub()
    assert set(on_hub.commits(REPO)[-1].files) - {".gitattributes"} == ALWAYS | BESIDE | ADAPTER | {"notes.md"}


# ---- Models that the log does not lead to ----


def test_weights_that_were_changed_after_training_get_no_card(make_trainer, on_hub, tmp_path):
    trainer = make_trainer(push_to_hub=False)
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).add_(1e-3)
    for save in (lambda: trainer.save_model(str(tmp_path / "other")), trainer.push_to_hub):
        with pytest.raises(ValueError, match="model: it is another one than training left, or was changed since"):
            save()
    assert not (tmp_path / "other").exists()


def test_another_model_gets_no_card(make_trainer, on_hub, tmp_path):
    trainer = make_trainer(push_to_hub=False)
    trainer.train()
    trainer.model = trainer.model.merge_and_unload()
    with pytest.raises(ValueError, match="model: it is another one than training left"):
        trainer.save_model(str(tmp_path / "other"))


def test_a_model_that_was_not_trained_is_not_saved_over_one_that_was(make_trainer, on_hub):
    trainer = make_trainer(push_to_hub=False)
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match="it holds the log of a run that did not lead to this model"):
        make_trainer(push_to_hub=False).save_model()


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "all parameters"])
@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step", "on_step_end"])
def test_an_interrupted_run_states_the_step_that_its_weights_are_of(make_trainer, on_hub, event, lora):
    """A step that is in the log and was not applied yet is applied."""

    def stop(callback, args, state, control, **kwargs):
        if state.global_step >= 2:
            raise KeyboardInterrupt

    stops = [type("Stop", (TrainerCallback,), {event: stop})()]
    trainer = make_trainer(push_to_hub=False, callbacks=stops, lora=lora)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model()
    assert all(finding.holds for finding in verify(trainer.args.output_dir))


@pytest.mark.parametrize("place", ["losses", "sweep", "update"])
def test_weights_that_a_step_was_stopped_in_the_middle_of_are_not_saved(make_trainer, on_hub, monkeypatch, place):
    """Where all parameters are trained, going back to where the step began rounds."""
    trainer, calls = make_trainer(push_to_hub=False, lora=False), []
    owner, name, count = {
        "losses": (BatchLosses, "__call__", 4),
        "sweep": (Rademacher, "add_", 31),
        "update": (ZOOptimizer, "_move_", 2),
    }[place]
    inner = getattr(owner, name)

    def stopped(*given, **named):
        if trainer._log is not None and trainer._log.was_opened:
            calls.append(None)
            if len(calls) == count:
                raise KeyboardInterrupt
        return inner(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    with pytest.raises(ValueError, match="model: training was stopped in the middle of a step"):
        trainer.save_model()


@pytest.mark.parametrize("lora", [True, False])
def test_weights_without_a_step_that_the_log_holds_are_not_saved(make_trainer, on_hub, monkeypatch, lora):
    """An adapter goes back exactly, but the log is one step ahead of it."""
    trainer, receive = make_trainer(push_to_hub=False, lora=lora), ZOOptimizer.receive

    def stopped(optimizer, *, step, coefficients):
        if step == 1:
            raise KeyboardInterrupt
        receive(optimizer, step=step, coefficients=coefficients)

    with monkeypatch.context() as patch:
        patch.setattr(ZOOptimizer, "receive", stopped)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert len(Trajectory.read(trainer.args.output_dir).records) == 2
    with pytest.raises(ValueError, match="model: training was stopped in the middle of a step"):
        trainer.save_model()


def test_results_in_a_card_are_those_of_its_weights(make_trainer, on_hub):
    trainer = make_trainer(push_to_hub=False, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    for step in range(1, STEPS + 1):
        said = json.loads((Path(trainer.args.output_dir) / f"checkpoint-{step}" / "privacy.json").read_text())
        logged = next(one for one in trainer.state.log_history if one["step"] == step and "eval_loss" in one)
        assert said["evaluation"]["after_step"] == step
        assert said["evaluation"]["metrics"]["eval_loss"] == logged["eval_loss"]


def test_pushing_a_log_needs_pushing(tmp_path):
    with pytest.raises(ValueError, match="push_trajectory=True: nothing is pushed"):
        ZOTrainingArguments(
            output_dir=str(tmp_path), noise_multiplier=1.0, target_delta=1e-5, push_trajectory=True, use_cpu=True
        )


# ---- A model as a log ----


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "all parameters"])
def test_a_model_can_be_published_as_its_log(make_trainer, on_hub, lora):
    trainer = make_trainer(lora=lora, push_trajectory=True, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.push_to_hub()
    for one in commits(on_hub):
        assert set(one.files) - {".gitattributes"} == ALWAYS | {"initial.safetensors"}
    model = hf_dpzo.from_trajectory(REPO)
    for (name, found), (_, trained) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(found, trained), name
    assert all(finding.holds for finding in verify(REPO))
    text = ModelCard.load(REPO).text
    assert "This repository holds no weights." in text and f'hf_dpzo.from_trajectory("{REPO}")' in text
    said = json.loads(commits(on_hub)[-1].files["privacy.json"])["reproducibility"]
    assert said["log"]["bytes"] == len(commits(on_hub)[-1].files["trajectory.zo"])
    assert said["weights"]["bytes"] == sum(4 * p.numel() for p in trainer.model.parameters() if p.requires_grad)


def test_command_publishes_the_log_of_a_saved_model(make_trainer, on_hub, capsys):
    trainer = make_trainer(push_to_hub=False)
    trainer.train()
    trainer.save_model()
    assert main(["push-log", trainer.args.output_dir, "tester/log", "--private"]) == 0
    assert "published" in capsys.readouterr().out
    files = on_hub.commits("tester/log")[-1].files
    assert set(files) - {".gitattributes"} == ALWAYS | {"initial.safetensors"}
    assert all(finding.holds for finding in verify("tester/log"))
    assert hf_dpzo.from_trajectory("tester/log") is not None
    assert main(["push-log", str(Path(trainer.args.output_dir).parent), "tester/log"]) == 2
    assert "it holds no trajectory.zo" in capsys.readouterr().err
    assert main(["push-log", trainer.args.output_dir, "a b"]) == 2
    assert "repository=a b: it is no name of a repository; name user/model.\n" in capsys.readouterr().err
    (Path(trainer.args.output_dir) / "privacy.json").unlink()
    assert main(["push-log", trainer.args.output_dir, "tester/never"]) == 2
    assert "run hf-dpzo card" in capsys.readouterr().err
    assert not any("never" in asked for asked in on_hub.requests)


def test_a_log_that_leads_elsewhere_gives_no_model(make_trainer, on_hub):
    trainer = make_trainer(push_trajectory=True)
    trainer.train()
    trainer.push_to_hub()
    said = json.loads(commits(on_hub)[-1].files["privacy.json"])
    said["reproducibility"]["weights"]["sha256"] = "0" * 64
    on_hub.edit(REPO, "privacy.json", json.dumps(said).encode())
    with pytest.raises(ValueError, match=r"leads to other weights than its privacy\.json states"):
        hf_dpzo.from_trajectory(REPO)


def test_a_run_goes_on_from_what_was_pushed(make_trainer, on_hub, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = make_trainer(callbacks=[Stop()], save_strategy="steps", save_steps=2)
    trainer.train()
    trainer._finish_current_push()
    folder = snapshot_download(REPO, local_dir=tmp_path / "elsewhere")
    again = make_trainer(output_dir=str(folder), hub_model_id=REPO)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS
    again.push_to_hub()
    assert len(Trajectory.read(folder).records) == STEPS
    assert all(finding.holds for finding in verify(REPO))


# ---- Attackers on the Hub ----


def test_an_edit_on_the_hub_is_named(make_trainer, on_hub, capsys):
    trainer = make_trainer()
    trainer.train()
    trainer.push_to_hub()
    card = commits(on_hub)[-1].files["README.md"].decode()
    on_hub.edit(REPO, "README.md", card.replace("one row", "everybody", 1).encode())
    assert main(["verify", REPO]) == 1
    assert "card" in capsys.readouterr().out


def test_files_that_are_too_large_are_not_downloaded(make_trainer, on_hub):
    trainer = make_trainer()
    trainer.train()
    trainer.push_to_hub()
    weights = commits(on_hub)[-1].files["adapter_model.safetensors"]
    for name, data in (("adapter_model.safetensors", weights + bytes(1 << 22)), ("README.md", bytes(1 << 22))):
        on_hub.edit(REPO, name, data)
        on_hub.requests.clear()
        assert any(one.holds is False and "not opened" in one.detail for one in verify(REPO))
        assert not any(f"resolve/{on_hub.commits(REPO)[-1].oid}/{name}" in asked for asked in on_hub.requests)


def test_a_swapped_base_model_on_the_hub_is_named(make_trainer, on_hub, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.push_to_hub()
    torch.manual_seed(7)
    classifier().save_pretrained(tmp_path / "other")
    assert all(finding.holds for finding in verify(REPO)), "the commit that the log names is still there"
    for finding in verify(REPO, base=str(tmp_path / "other")):
        assert finding.holds is (finding.name != "base model")
