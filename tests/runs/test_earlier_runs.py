"""A run that goes on from what an earlier one made says so, and adds up where it is told of that one's log."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorWithPadding, TrainerCallback

from hf_dpzo import Trajectory, ZOTrainer, seeded_peft_model
from hf_dpzo.models import history
from hf_dpzo.privacy.accounting import account
from hf_dpzo.trajectory.earlier_runs import read_earlier_runs
from hf_dpzo.trajectory.run import LoggedRun
from hf_dpzo.verification.verify import verify

from support.bases import LORA, load
from support.models import one_layer, word_tokenizer
from support.rows import few_public_rows, labelled_rows


@pytest.fixture
def make(make_args, tmp_path):
    def made(model, out: str, callbacks=(), **changes) -> ZOTrainer:
        return ZOTrainer(
            model=model,
            args=make_args(output_dir=str(tmp_path / out), max_steps=3, **changes),
            train_dataset=labelled_rows(20),
            data_collator=DataCollatorWithPadding(word_tokenizer()),
            probe_rows=few_public_rows(),
            callbacks=list(callbacks),
        )

    return made


@pytest.fixture
def elsewhere(monkeypatch):
    """As in a process of its own, which knows nothing of the runs of this one."""
    monkeypatch.setattr(history, "_RUNS", {})


def loaded(base, folder):
    return PeftModel.from_pretrained(load(base), folder, is_trainable=True)


def first_run(make, base, out="first", **changes):
    trainer = make(seeded_peft_model(load(base), LoraConfig(**LORA), seed=1), out, **changes)
    trainer.train()
    trainer.save_model()
    return trainer


def saved(trainer, base):
    """Train and save; return the statement and the card, which verify."""
    trainer.train()
    trainer.save_model()
    out = trainer.args.output_dir
    assert [finding.detail for finding in verify(out, base=str(base)) if finding.holds is False] == []
    with open(f"{out}/privacy.json") as statement, open(f"{out}/README.md") as card:
        return json.load(statement), card.read()


def test_a_run_adds_up_with_the_one_whose_adapter_it_goes_on_from(make, base, tmp_path):
    first = first_run(make, base)
    said, card = saved(make(loaded(base, tmp_path / "first"), "second", earlier_runs=[str(tmp_path / "first")]), base)
    query = LoggedRun.from_log(Trajectory.read(tmp_path / "first")).budget.query
    expected = account(((query, 6),), delta=1e-4).epsilon
    assert said["claim"]["epsilon"] == pytest.approx(expected, abs=1e-3)
    assert said["claim"]["epsilon"] > 1.05 * first.budget.guarantee().epsilon
    assert said["claim"]["steps_claimed"] == said["claim"]["steps_taken"] == 3
    assert "The guarantee covers what those released too, in\n3 steps" in card
    assert "a card counts its own run alone, and the earlier ones that it was told of" in card
    assert "on the same rows, both add up" not in card


def test_runs_before_the_earlier_one_count_too_and_copies_of_a_log_once(make, base, tmp_path):
    first_run(make, base)
    make_second = make(loaded(base, tmp_path / "first"), "second", earlier_runs=[str(tmp_path / "first")])
    saved(make_second, base)
    shutil.copytree(tmp_path / "second", tmp_path / "copy")
    folders = [tmp_path / "second", tmp_path / "copy"]
    assert sum(count for _, count in read_earlier_runs(folders, unit_column=None).releases) == 6
    third = make(loaded(base, tmp_path / "second"), "third", earlier_runs=[str(folder) for folder in folders])
    said, _ = saved(third, base)
    assert sum(release["count"] for release in said["claim"]["earlier"]) == 6
    query = third.budget.query
    assert said["claim"]["epsilon"] == pytest.approx(account(((query, 9),), delta=1e-4).epsilon, abs=1e-3)


def test_noise_is_chosen_for_what_earlier_runs_have_left_of_the_target(make, base, tmp_path):
    first = first_run(make, base, noise_multiplier=4.0)
    spent = first.budget.guarantee().epsilon
    options = {"noise_multiplier": "absent", "earlier_runs": [str(tmp_path / "first")]}
    second = make(loaded(base, tmp_path / "first"), "second", target_epsilon=2 * spent, **options)
    assert 1.9 * spent < second.budget.guarantee().epsilon <= 2 * spent
    with pytest.raises(ValueError, match=r"target_epsilon=.*: earlier runs have spent .* of it; raise it"):
        make(loaded(base, tmp_path / "first"), "third", target_epsilon=spent, **options)


def test_a_run_that_is_killed_goes_on_with_its_earlier_ones(make, base, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    first_run(make, base)
    options = {"earlier_runs": [str(tmp_path / "first")], "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        make(loaded(base, tmp_path / "first"), "second", [Stop()], **options).train()
    with pytest.raises(ValueError, match=r"log in .* is of another run"):
        make(loaded(base, tmp_path / "first"), "second").train(resume_from_checkpoint=True)
    trainer = make(loaded(base, tmp_path / "first"), "second", **options)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert [finding.detail for finding in verify(tmp_path / "second", base=str(base)) if finding.holds is False] == []


def test_a_log_is_told_in_vain_where_another_run_made_the_adapter(make, base, tmp_path):
    first_run(make, base)
    first_run(make, base, out="other", seed=4)
    with pytest.raises(ValueError, match="or name the folder of that run in earlier_runs"):
        make(loaded(base, tmp_path / "first"), "second", earlier_runs=[str(tmp_path / "other")]).train()


def test_an_adapter_of_a_run_beside_this_one_is_named_with_its_epsilon(make, base, tmp_path, elsewhere, monkeypatch):
    first = first_run(make, base)
    monkeypatch.setattr(history, "_RUNS", {})
    said, card = saved(make(loaded(base, tmp_path / "first"), "second"), base)
    (line,) = [line for line in said["not_covered"] if "both add up" in line]
    stated = json.loads((tmp_path / "first" / "privacy.json").read_text())["claim"]
    assert f"epsilon = {stated['epsilon']}, delta = {stated['delta']}" in line and line in card
    assert said["claim"]["epsilon"] < 1.01 * first.budget.guarantee().epsilon


def test_an_adapter_that_was_trained_somewhere_else_is_said_to_be(make, base, tmp_path, elsewhere, monkeypatch):
    first_run(make, base)
    shutil.move(tmp_path / "first", tmp_path / "base" / "far away")
    monkeypatch.setattr(history, "_RUNS", {})
    said, card = saved(make(loaded(base, tmp_path / "base" / "far away"), "second"), base)
    (line,) = [line for line in said["not_covered"] if "what both spent adds up" in line]
    assert line in card


def test_a_base_model_that_a_private_run_made_is_named_with_its_epsilon(make, base, tmp_path, elsewhere, monkeypatch):
    trainer = make(load(base), "first")
    trainer.train()
    trainer.save_model()
    monkeypatch.setattr(history, "_RUNS", {})
    model = seeded_peft_model(load(tmp_path / "first"), LoraConfig(**LORA), seed=1)
    said, _ = saved(make(model, "second"), tmp_path / "first")
    assert [line for line in said["not_covered"] if "both add up" in line]


def test_a_new_adapter_says_nothing_of_earlier_runs(make, base):
    first_run(make, base)
    torch.manual_seed(3)
    said, card = saved(make(get_peft_model(load(base), LoraConfig(**LORA)), "second"), base)
    assert not [line for line in said["not_covered"] if "add" in line]
    assert "earlier" not in said["claim"] and "earlier" not in card
    assert "began_from" not in Trajectory.read(base.parent / "second").header


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"earlier_runs": ["nowhere"]}, "nowhere: there is no log of a run"),
        ({"earlier_runs": "first"}, "earlier_runs='first': it must be a list"),
        (
            {"earlier_runs": ["first"], "method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"},
            "earlier_runs=.*: without noise there is no guarantee to cover them",
        ),
    ],
)
def test_earlier_runs_that_cannot_be_counted_are_refused(changes, message, make):
    with pytest.raises(ValueError, match=message):
        make(one_layer(), "second", **changes)


def test_a_run_without_noise_or_of_another_unit_cannot_be_counted(make, base, tmp_path):
    make(load(base), "loud", method="mezo", noise_multiplier="absent", target_delta="absent").train()
    with pytest.raises(ValueError, match=r"earlier_runs=.*loud: that run added no noise"):
        make(load(base), "second", earlier_runs=[str(tmp_path / "loud")])
    first_run(make, base)
    with pytest.raises(ValueError, match=r"earlier_runs=.*first: its unit of privacy is a row"):
        read_earlier_runs([tmp_path / "first"], unit_column="user")
