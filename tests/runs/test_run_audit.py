"""A run with canaries can be audited: their coins stay secret, and survive whatever the run survives."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from hf_dpzo import Trajectory, ZOTrainer
from hf_dpzo.auditing.canaries import RowsWithCanaries
from hf_dpzo.auditing.coins import COINS_FILE, Coins
from hf_dpzo.auditing.run_audit import collect_released
from hf_dpzo.cli.main import main
from hf_dpzo.data.sampling import DrawnRow
from hf_dpzo.privacy.noise import DiscreteGaussian
from hf_dpzo.recipe.run import rebuild_trainer
from hf_dpzo.verification.verify import verify

from support.models import one_layer, with_lora, word_tokenizer
from support.recipes import refused, table
from support.rows import few_public_rows, labelled_rows
from support.runs import fingerprint, short_args, train


CANARIES, ROWS = 8, 8


def everybody(folder: Path, **changes) -> ZOTrainer:
    """Train on batches that all rows and canaries take part in. The model is the same in each process."""
    torch.manual_seed(0)
    return train(
        folder,
        **{
            "rows": labelled_rows(ROWS),
            "canaries": CANARIES,
            "expected_batch_size": ROWS + CANARIES,
            "method": "aggzo",
            "num_directions": 2,
            "target_delta": 1e-5,
            **changes,
        },
    )


def attacked(folder: Path, **changes) -> ZOTrainer:
    """Train with enough numbers to see how far they spread."""
    settings = {"num_directions": 16, "clip_norm": 1e-3, "noise_multiplier": 8.0, "max_steps": 20}
    settings |= {"canaries": 16, "expected_batch_size": ROWS + 16, "per_device_train_batch_size": ROWS + 16}
    settings |= {"points_per_pass": 16}  # The time is that of passes.
    return everybody(folder, **settings, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> ZOTrainer:
    """A short run, already audited. To be read alone."""
    trainer = everybody(tmp_path_factory.mktemp("trained") / "run")
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def folder(trained) -> Path:
    return Path(trained.args.output_dir)


# ---- What an audit finds ----


def test_an_honest_run_is_not_accused(tmp_path):
    found = attacked(tmp_path / "run").audit_run()
    assert not found.exceeds_claim or found.chance > 1e-4  # It may be, in one of 20 runs, but not so clearly.
    assert 0 < found.epsilon_lower < 1.3 * found.epsilon_claimed
    assert found.strength > 0.99


def test_a_run_with_half_of_its_noise_is_caught(tmp_path, monkeypatch):
    honest = DiscreteGaussian.add
    monkeypatch.setattr(DiscreteGaussian, "add", lambda one, sums: honest(DiscreteGaussian(scale=one.scale // 2), sums))
    found = attacked(tmp_path / "run").audit_run()
    assert found.exceeds_claim
    assert found.epsilon_lower > found.epsilon_claimed
    assert found.chance < 1e-6


def test_the_canaries_parts_are_those_that_training_added_up(tmp_path, sums):
    """Rows that are too long contribute nothing. So without noise, what is released is what the canaries add."""
    long = Dataset.from_list([{"input_ids": [5] * 30, "attention_mask": [1] * 30, "labels": 0}] * ROWS)
    trainer = everybody(tmp_path / "run", rows=long, learning_rate=0.1)
    log, coins = Trajectory.read(tmp_path / "run"), Coins.load(tmp_path / "run")
    evidence = trainer._collect_evidence(tmp_path / "run", log)
    assert np.array_equal(evidence.coefficients[coins.mask].sum(axis=0), collect_released(log.records))
    assert np.abs(evidence.coefficients[:, 1:]).sum(axis=2).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"update": "adam"},
        {"method": "zopo", "num_stages": 2, "num_directions": 2},
        {"points_per_pass": 4},
        {"method": "dpzo", "noise": "laplace", "num_directions": "absent"},
        {"expected_batch_size": 4},
    ],
    ids=str,
)
def test_every_kind_of_run_is_audited_and_left_as_it_was(tmp_path, changes):
    trainer = everybody(tmp_path / "run", **changes)
    before = fingerprint(trainer)
    found = trainer.audit_run()
    assert fingerprint(trainer) == before
    assert (found.steps, found.canaries) == (4, CANARIES)
    trainer.save_model()


def test_another_trainer_of_the_same_run_finds_the_same(trained, folder):
    before = fingerprint(trained)
    found = trained.audit_run()
    torch.manual_seed(0)
    other = ZOTrainer(
        model=with_lora(one_layer()),
        args=trained.args,
        train_dataset=labelled_rows(ROWS),
        data_collator=DataCollatorWithPadding(word_tokenizer()),
        probe_rows=few_public_rows(),
    )
    assert other.audit_run() == found
    assert fingerprint(trained) == before


# ---- Canaries among the rows ----


def test_canaries_count_as_rows_whatever_their_coins_are(trained, folder):
    rows = Trajectory.read(folder).header["rows"]
    assert (rows["rows"], rows["units"]) == (ROWS + CANARIES, ROWS + CANARIES)
    assert rows["canaries"]["count"] == CANARIES
    assert trained.budget.query.sampling_rate == 1.0


def test_a_canary_that_is_out_has_no_content():
    coins = Coins(values=(True, False), nonce="")
    canaries = [{"input_ids": [5]}, {"input_ids": [6]}]
    rows = RowsWithCanaries(labelled_rows(3), dropped_column=None, canaries=canaries, coins=coins)
    fetched = rows.__getitems__([DrawnRow(unit=n, row=row, slot=n) for n, row in enumerate((2, 3, 4))])
    assert [row.row for row in fetched] == [labelled_rows(3)[2], {"input_ids": [5]}, None]
    assert len(rows) == 5


def test_each_canary_is_a_user_of_its_own(tmp_path):
    users = labelled_rows(ROWS).add_column("user", [n // 2 for n in range(ROWS)])
    trainer = everybody(tmp_path / "run", rows=users, privacy_unit_column="user", expected_batch_size=4)
    assert Trajectory.read(tmp_path / "run").header["rows"]["units"] == ROWS // 2 + CANARIES
    assert trainer.audit_run().steps == 4


# ---- The coins ----


def test_a_resumed_run_has_the_same_coins_and_is_audited_from_its_beginning(tmp_path):
    """All parameters are trained, which are kept in checkpoints alone."""

    def go(**changes) -> ZOTrainer:
        torch.manual_seed(0)
        return everybody(tmp_path / "run", model=one_layer(), save_strategy="steps", save_steps=2, **changes)

    first = go()
    coins = Coins.load(tmp_path / "run")
    log = tmp_path / "run" / "trajectory.zo"
    record = Trajectory.read(log).layout.record_size
    log.write_bytes(log.read_bytes()[: -record - 3])  # As if it had been killed while it wrote its third step.
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = go(resume=True)
    assert Coins.load(tmp_path / "run") == coins
    found = resumed.audit_run()
    assert found.included == sum(coins.values)
    assert found.steps == 3  # What the torn record held is not known.
    assert first.args.canaries == CANARIES


def test_a_run_is_not_resumed_with_other_coins_or_without_any(tmp_path):
    everybody(tmp_path / "run")
    (tmp_path / "run" / COINS_FILE).rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="the coins of the canaries are not there"):
        everybody(tmp_path / "run", resume=True)
    Coins.flip(CANARIES).save(tmp_path / "run")
    with pytest.raises(ValueError, match="commitment"):
        everybody(tmp_path / "run", resume=True)


def test_other_coins_are_not_audited(tmp_path):
    trainer = everybody(tmp_path / "run")
    Coins.flip(CANARIES).save(tmp_path / "run")
    with pytest.raises(ValueError, match="other canaries or other coins"):
        trainer.audit_run()


def test_nothing_that_is_published_holds_the_coins(tmp_path, hub):
    trainer = everybody(tmp_path / "run", push_to_hub=True, hub_model_id="tester/audited", save_strategy="steps")
    trainer.audit_run(card=True)
    trainer.push_to_hub()
    coins = Coins.load(tmp_path / "run")
    texts = ["".join(str(int(value)) for value in coins.values), str([int(value) for value in coins.values])]
    secrets = [coins.nonce, *texts, json.dumps([int(value) for value in coins.values])]
    pushed = [data for commit in hub.commits("tester/audited") for data in commit.files.values()]
    assert len(pushed) > 5
    assert not any(COINS_FILE in commit.files for commit in hub.commits("tester/audited"))
    others = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != COINS_FILE]
    for data in [*pushed, *(path.read_bytes() for path in others)]:
        assert not any(secret.encode() in data for secret in secrets)


def test_coins_lie_in_the_folder_of_the_run_alone(tmp_path):
    everybody(tmp_path / "run", save_strategy="steps", save_steps=2).save_model(str(tmp_path / "elsewhere"))
    assert [path.parent for path in tmp_path.rglob(f"{COINS_FILE}*")] == [tmp_path / "run"]


# ---- The card ----


def test_the_card_tells_what_was_found_and_still_verifies(tmp_path):
    trainer = everybody(tmp_path / "run")
    trainer.save_model()
    assert "Empirical" not in (tmp_path / "run" / "README.md").read_text()
    assert "8 of the rows that were counted are canaries" in (tmp_path / "run" / "README.md").read_text()
    found = trainer.audit_run(card=True)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| guesses, right | {found.guesses}, {found.correct} |" in card
    statement = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert statement["validity_checks"]["empirical"] == found.as_json()
    trainer.save_model(str(tmp_path / "copy"))
    assert main(["card", str(tmp_path / "copy")]) == 0
    for name in ("run", "copy"):
        assert "Empirical" in (tmp_path / name / "README.md").read_text()
        findings = verify(tmp_path / name, weights=False)
        assert all(finding.holds for finding in findings), findings


def test_a_run_that_clearly_showed_more_than_its_claim_is_not_called_private(tmp_path, monkeypatch):
    honest = DiscreteGaussian.add
    monkeypatch.setattr(DiscreteGaussian, "add", lambda one, sums: honest(DiscreteGaussian(scale=one.scale // 4), sums))
    saves = {"save_strategy": "steps", "save_steps": 10}
    attacked(tmp_path / "run", **saves).audit_run(card=True)

    def states() -> set[str]:
        return {json.loads(path.read_text())["status"] for path in (tmp_path / "run").rglob("privacy.json")}

    assert states() == {"NOT_PRIVATE"}
    assert len([*(tmp_path / "run").rglob("privacy.json")]) > 1
    attacked(tmp_path / "run", **saves, resume=True).save_model()
    assert states() == {"NOT_PRIVATE"}


# ---- The command, and what is refused ----


def test_the_command_audits_the_run_of_a_recipe(write, workplace, capsys):
    recipe = write(canaries=8, expected_batch_size=40)
    assert main(["train", recipe, "--max_steps", "3"]) == 0
    out = workplace / "out"
    assert "audit --run" in table(capsys.readouterr().out)["canaries"]
    Path(recipe).unlink()
    assert main(["audit", "--run", str(out), "--card"]) == 0
    lines = table(capsys.readouterr().out)
    assert lines["steps replayed"] == "3"
    assert lines["epsilon, claimed"].endswith("at delta = 0.001")
    assert "Empirical" in (out / "README.md").read_text()
    assert all(finding.holds for finding in verify(out, base=str(workplace / "causal")))
    moved = shutil.move(out, workplace / "moved")
    assert rebuild_trainer(Path(moved)).audit_run().steps == 3


def test_a_run_is_audited_from_another_folder_than_it_was_made_in(write, workplace, tmp_path, capsys, monkeypatch):
    """A recipe may name its model and its data by paths that are relative to where it was run."""
    monkeypatch.chdir(workplace)
    recipe = write(canaries=8, expected_batch_size=40, model_name_or_path="causal", data="rows.csv", output_dir="here")
    assert main(["train", recipe, "--max_steps", "2"]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert main(["audit", "--run", str(workplace / "here")]) == 0
    assert table(capsys.readouterr().out)["steps replayed"] == "2"
    (workplace / "rows.csv").rename(workplace / "moved.csv")
    assert "it is not there any more" in refused(capsys, "audit", "--run", str(workplace / "here"))
    assert main(["audit", "--run", str(workplace / "here"), f"--data={workplace / 'moved.csv'}"]) == 0


def test_a_run_without_canaries_or_without_a_recipe_is_not_audited_by_the_command(folder, tmp_path, capsys):
    assert "not a recipe" in refused(capsys, "audit", "--run", str(folder))
    assert "no log of a run" in refused(capsys, "audit", "--run", str(tmp_path))
    assert "no such folder" in refused(capsys, "audit", "--run", str(tmp_path / "nowhere"))
    train(tmp_path / "without")
    assert "it had no canaries" in refused(capsys, "audit", "--run", str(tmp_path / "without"))
    assert "leave this out" in refused(capsys, "audit", "quickstart", "--run", str(folder))


def test_an_audit_that_cannot_be_made_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="confidence=2"):
        trained.audit_run(confidence=2)
    without = train(tmp_path / "without")
    with pytest.raises(ValueError, match="canaries=None"):
        without.audit_run()
    with pytest.raises(ValueError, match="no log of a run"):
        untrained(tmp_path / "never").audit_run()


def untrained(folder: Path, **changes) -> ZOTrainer:
    settings = {"canaries": CANARIES, "padded_lengths": [16], **changes}
    return ZOTrainer(
        model=with_lora(one_layer()),
        args=short_args(folder, **settings),
        train_dataset=labelled_rows(ROWS),
        eval_dataset=labelled_rows(ROWS, 1),
        data_collator=DataCollatorWithPadding(word_tokenizer()),
        probe_rows=few_public_rows(),
    )


def test_canaries_do_not_go_with_a_search_or_without_noise(tmp_path):
    trainer = untrained(tmp_path / "search", trials=2, eval_data_is_public=True)
    with pytest.raises(ValueError, match="canaries=8: the coins are those of one run"):
        trainer.hyperparameter_search(lambda trial: {}, n_trials=2)
    without = {"method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"}
    with pytest.raises(ValueError, match="canaries=8: without noise"):
        short_args(tmp_path / "mezo", canaries=8, **without, expected_batch_size=4)
    with pytest.raises(ValueError, match="canaries=1"):
        short_args(tmp_path / "one", canaries=1)


def test_the_number_of_canaries_cannot_change_after_planning(tmp_path):
    trainer = untrained(tmp_path / "run")
    trainer.args.canaries = 20
    with pytest.raises(ValueError, match="canaries=20: the budget was planned with canaries=8"):
        trainer.train()


def test_rows_that_cannot_be_made_up_cannot_be_canaries(tmp_path):
    texts = labelled_rows(ROWS).add_column("text", ["secret"] * ROWS)
    with pytest.raises(ValueError, match="leave canaries out"):
        everybody(tmp_path / "run", rows=texts, remove_unused_columns=False)
