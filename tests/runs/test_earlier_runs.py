"""A run that goes on from what an earlier one made says so, and adds up where it is told of that one's log."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorWithPadding, TrainerCallback

from hf_dpzo import Trajectory, ZOTrainer, from_trajectory, seeded_peft_model
from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.models import history
from hf_dpzo.privacy.accounting import account
from hf_dpzo.trainer import checking
from hf_dpzo.trajectory.earlier_runs import read_earlier_runs
from hf_dpzo.trajectory.run import LoggedRun
from hf_dpzo.trajectory.writer import TrajectoryWriter
from hf_dpzo.verification.verify import verify

from support.bases import LORA, load
from support.models import one_layer, word_tokenizer
from support.published import rewrite
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
    with pytest.raises(ValueError, match=r"earlier_runs=.*first: its privacy_unit_column is None"):
        read_earlier_runs([tmp_path / "first"], unit_column="user")


def forget(monkeypatch):
    """Go on as in a process that knows nothing of the runs before."""
    monkeypatch.setattr(history, "_RUNS", {})


def find_lines(said, words: str) -> list[str]:
    return [line for line in said["not_covered"] if words in line]


def test_what_a_counted_run_did_not_count_is_said(make, base, tmp_path, elsewhere, monkeypatch):
    first_run(make, base)
    forget(monkeypatch)
    uncounted, _ = saved(make(loaded(base, tmp_path / "first"), "second"), base)
    forget(monkeypatch)
    third = make(loaded(base, tmp_path / "second"), "third", earlier_runs=[str(tmp_path / "second")])
    said, card = saved(third, base)
    (line,) = find_lines(said, "both add up")
    assert line == find_lines(uncounted, "both add up")[0] and line in card


def test_a_named_run_that_did_not_make_the_adapter_silences_nothing(make, base, tmp_path, elsewhere, monkeypatch):
    first_run(make, base)
    first_run(make, base, out="other", seed=4)
    shutil.move(tmp_path / "other", tmp_path / "base" / "far away")
    forget(monkeypatch)
    adapter = loaded(base, tmp_path / "base" / "far away")
    said, _ = saved(make(adapter, "second", earlier_runs=[str(tmp_path / "first")]), base)
    assert find_lines(said, "what both spent adds up")


def test_a_checkpoint_of_a_named_run_is_counted(make, base, tmp_path, elsewhere, monkeypatch):
    first_run(make, base, save_strategy="steps", save_steps=2)
    shutil.move(tmp_path / "first", tmp_path / "base" / "far away")
    forget(monkeypatch)
    folder = tmp_path / "base" / "far away"
    said, _ = saved(make(loaded(base, folder / "checkpoint-2"), "second", earlier_runs=[str(folder)]), base)
    assert not find_lines(said, "add")


def test_a_run_whose_card_claims_nothing_cannot_be_counted(make, base, tmp_path):
    first_run(make, base)
    rewrite(tmp_path / "first" / "privacy.json", lambda said: said.update(claim=None, status="NOT_PRIVATE"))
    second = make(loaded(base, tmp_path / "first"), "second", earlier_runs=[str(tmp_path / "first")])
    with pytest.raises(ValueError, match=r"earlier_runs=.*first: its privacy.json says that it keeps no guarantee"):
        second.train()


def test_a_base_model_that_a_run_without_noise_made_is_named(make, base, tmp_path, elsewhere, monkeypatch):
    trainer = make(load(base), "first", method="mezo", noise_multiplier="absent", target_delta="absent")
    trainer.train()
    trainer.save_model()
    forget(monkeypatch)
    said, _ = saved(make(load(tmp_path / "first"), "second"), tmp_path / "first")
    assert find_lines(said, "what both spent adds up")


def test_users_of_another_column_cannot_be_counted(base, tmp_path, make_args):
    trainer = ZOTrainer(
        model=load(base),
        args=make_args(
            output_dir=str(tmp_path / "first"), max_steps=1, privacy_unit_column="session", max_rows_per_unit=1
        ),
        train_dataset=[{**row, "session": f"s{i}"} for i, row in enumerate(labelled_rows(20))],
        data_collator=DataCollatorWithPadding(word_tokenizer()),
        probe_rows=few_public_rows(),
    )
    trainer.train()
    with pytest.raises(ValueError, match="its privacy_unit_column is session"):
        read_earlier_runs([tmp_path / "first"], unit_column="user")


def test_an_adapter_is_judged_apart_from_the_base_that_it_was_trained_on(make, base, tmp_path, elsewhere, monkeypatch):
    whole = make(load(base), "whole")
    whole.train()
    whole.save_model()
    forget(monkeypatch)
    make_adapter = seeded_peft_model(load(tmp_path / "whole"), LoraConfig(**LORA), seed=1)
    saved(make(make_adapter, "adapter", earlier_runs=[str(tmp_path / "whole")]), tmp_path / "whole")
    forget(monkeypatch)
    adapter = PeftModel.from_pretrained(load(tmp_path / "whole"), tmp_path / "adapter", is_trainable=True)
    said, _ = saved(make(adapter, "third", earlier_runs=[str(tmp_path / "whole")]), tmp_path / "whole")
    assert len(find_lines(said, "both add up")) == 1  # The adapter's run is not counted.
    forget(monkeypatch)
    adapter = PeftModel.from_pretrained(load(tmp_path / "whole"), tmp_path / "adapter", is_trainable=True)
    said, _ = saved(make(adapter, "fourth", earlier_runs=[str(tmp_path / "adapter")]), tmp_path / "whole")
    assert not find_lines(said, "add up")  # It has counted the base.


def test_a_base_whose_statement_cannot_be_read_is_named(make, base, tmp_path, elsewhere):
    (base / "privacy.json").write_text('{"schema": "hf-dpzo/privacy@99"}')
    said, _ = saved(make(load(base), "second"), base)
    assert find_lines(said, "what both spent adds up")


def test_copies_of_a_log_that_went_on_apart_both_count(make, base, tmp_path):
    first_run(make, base)
    log = Trajectory.read(tmp_path / "first")
    (tmp_path / "fork").mkdir()
    writer = TrajectoryWriter.create(tmp_path / "fork" / "trajectory.zo", dict(log.header))
    for record in log.records:
        integers = tuple(value + (record.step > 0) for value in record.integers)
        writer.append(dataclasses.replace(record, integers=integers))
    writer.close()
    both = read_earlier_runs([tmp_path / "first", tmp_path / "fork"], unit_column=None)
    assert sum(count for _, count in both.releases) == 6
    one = read_earlier_runs([tmp_path / "first"], unit_column=None)
    assert one.count(log) and not one.count(Trajectory.read(tmp_path / "fork"))


def test_the_card_states_the_weakest_isolation_of_all_that_it_covers(make, base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checking, "measure_isolation", lambda *_, **__: Isolation(loss_change=1e-7))
        first_run(make, base)
    with monkeypatch.context() as patch:
        patch.setattr(checking, "measure_isolation", lambda *_, **__: Isolation(loss_change=0.0))
        second = make(loaded(base, tmp_path / "first"), "second", earlier_runs=[str(tmp_path / "first")])
        said, _ = saved(second, base)
    first = json.loads((tmp_path / "first" / "privacy.json").read_text())
    assert first["validity_checks"]["numerical_isolation"]["status"] == "bounded"
    assert said["validity_checks"]["numerical_isolation"] == first["validity_checks"]["numerical_isolation"]


@pytest.mark.parametrize("is_counted", [False, True])
def test_a_model_that_was_rebuilt_from_a_log_is_named(is_counted, make, base, tmp_path, elsewhere, monkeypatch):
    trainer = make(load(base), "first")
    trainer.train()
    trainer.save_model()
    shutil.move(tmp_path / "first", tmp_path / "base" / "far away")
    folder = tmp_path / "base" / "far away"
    forget(monkeypatch)
    options = {"earlier_runs": [str(folder)]} if is_counted else {}
    said, _ = saved(make(from_trajectory(folder, base=str(base)), "second", **options), folder)
    assert bool(find_lines(said, "both add up")) is not is_counted
