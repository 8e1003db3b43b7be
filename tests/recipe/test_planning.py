"""What is said of a run before it begins, and that it is what the run then does."""

import csv
import json

import pytest

import hf_dpzo
from hf_dpzo import ZOTrainer, plots
from hf_dpzo.card.model_card import format_percent
from hf_dpzo.cli.main import main
from hf_dpzo.data.sampling import SealedRows
from hf_dpzo.models.fingerprints import fingerprint_values
from hf_dpzo.recipe import planning
from hf_dpzo.trainer import features, rehearsing, trainer
from hf_dpzo.trainer.step_trial import StopTimes
from hf_dpzo.trajectory.log import LOG_FILE

from support.models import classifier, one_layer, with_lora
from support.recipes import refused, table
from support.rows import labelled_rows
from support.runs import short_args
from support.stacks import find_layers


HEAD = {
    "task": "feature-classification",
    "layer": 1,
    "lora_target_modules": "absent",
    "lora_r": "absent",
    "method": "aggzo",
    "num_directions": 2,
    "expected_batch_size": 70,
}
# What is measured, and differs from one plan to the next.
MEASURED = {"seconds", "seconds_before", "seconds_reading", "seconds_per_step", "memory_bytes"}


@pytest.fixture
def nobody_looks(monkeypatch):
    """Whoever fetches a private row fails."""
    monkeypatch.setattr(SealedRows, "__getitems__", lambda *_: pytest.fail("a private row was fetched"))
    monkeypatch.setattr(features.FeatureTrainer, "_fill_table", lambda *_: pytest.fail("a private row was read"))


def planned(capsys, path: str, *flags: str, status: int = 0) -> dict:
    assert main(["plan", path, "--json", *flags]) == status
    return json.loads(capsys.readouterr().out)


def without_measured(plan: dict) -> dict:
    return {name: value for name, value in plan.items() if name not in MEASURED}


def test_a_plan_is_what_the_run_then_does_and_its_card_says(write, workplace, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SealedRows, "__getitems__", lambda *_: pytest.fail("a private row was fetched"))
        plan = planned(capsys, write())
    assert not (workplace / "out").exists() and plan["refusals"] == []
    assert main(["train", write()]) == 0
    statement = json.loads((workplace / "out" / "privacy.json").read_text())
    claim, meaning = statement["claim"], statement["meaning"]
    one, *more = plan["promises"]
    assert one["epsilon"] == claim["epsilon"] and plan["delta"] == claim["delta"]
    assert one["membership"] == meaning["best_membership_accuracy"]
    assert one["detection"] == meaning["detection_rate"]["detected"]
    assert [{"rows": each["rows"], "epsilon": each["epsilon"]} for each in more] == claim["groups"]
    assert one["membership"] < more[0]["membership"] < more[1]["membership"] < 1
    assert plan["log_bytes"] == (workplace / "out" / LOG_FILE).stat().st_size
    assert plan["rows"] == plan["units"] == 70 and plan["evaluated"] == 2 * 8 and plan["passes"] == 2


def test_the_table_says_it_in_words(write, capsys):
    assert main(["plan", write(), "--max_steps", "3"]) == 0
    said = table(capsys.readouterr().out)
    plan = planned(capsys, write(), "--max_steps", "3")
    assert said["steps"] == "3" and said["rows"] == "70" and "KB" in said["size of the log"]
    assert "guessed right" in said["epsilon of a person with 4 rows"]
    assert (
        f"guessed right {format_percent(plan['promises'][0]['membership'])}" in said["epsilon of a person with 1 row"]
    )
    assert "% of the largest possible signal" in said["noise of a step"]
    assert (
        "clipped at the start" in said["what limits it"] and "made-up rows of 128 tokens" in said["seconds of a step"]
    )


def test_nothing_of_private_rows_shows_but_their_number(write, workplace, capsys, nobody_looks):
    plans = []
    for text in ("w1 w2", "w3 " * 30):
        with (workplace / "rows.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *([f"{text} w{i % 40}", i % 2] for i in range(80))])
        plans.append(without_measured(planned(capsys, write(eval_rows="absent"))))
    assert plans[0] == plans[1]


def test_everything_that_training_would_refuse_is_listed(write, workplace, capsys):
    (workplace / "out").mkdir()
    (workplace / "out" / LOG_FILE).write_bytes(b"a run")
    plan = planned(capsys, write(), "--report_to", "wandb", "--padded_lengths", "200", status=1)
    reasons = [sentence.partition("=")[0] for sentence in plan["refusals"]]
    assert reasons == ["output_dir", "report_to"] and len(plan["promises"]) == 3
    assert "it holds the log of a run" in table(text_of(capsys, write()))["would be refused"]


def text_of(capsys, path: str) -> str:
    assert main(["plan", path]) == 1
    return capsys.readouterr().out


def test_what_rows_would_be_refused_for_is_found_on_made_up_ones(tmp_path):
    def joined(model, inputs):
        return model(**inputs).logits.mean().expand(len(inputs["labels"]))

    found = plan_of(tmp_path, per_example_loss=joined)
    assert "moved a row's loss" in found.refusals[0] and found.seconds is None and found.promises
    assert not (tmp_path / LOG_FILE).exists()


def plan_of(folder, *, model=None, per_example_loss=None, **changes):
    return hf_dpzo.plan(build(folder, model=model, per_example_loss=per_example_loss, **changes))


def build(folder, *, model=None, per_example_loss=None, **changes) -> ZOTrainer:
    return ZOTrainer(
        model=model or one_layer(),
        args=short_args(folder, **{"max_steps": 2, **changes}),
        train_dataset=labelled_rows(16),
        per_example_loss=per_example_loss,
    )


def test_a_run_that_does_nothing_is_found(tmp_path):
    assert "smoothing=1e-30" in plan_of(tmp_path, smoothing=1e-30).refusals[0]


def test_a_mistaken_recipe_and_a_missing_model_are_one_sentence(write, capsys):
    assert "expected_batch_size=99: the training data have 70 rows" in refused(
        capsys, "plan", write(expected_batch_size=99)
    )
    assert refused(capsys, "plan", write(), "--epsilonn", "2").startswith("epsilonn")


@pytest.mark.parametrize("model", [one_layer, lambda: with_lora(classifier())], ids=["all parameters", "adapter"])
def test_the_planned_trainer_trains_as_if_it_had_not_been_planned(tmp_path, model):
    built = model()
    before = fingerprint_values(built.parameters())
    run = build(tmp_path, model=built)
    plan = run.plan()
    assert plan.refusals == () and plan.seconds_per_step > 0 and plan.memory_bytes > 0
    assert fingerprint_values(built.parameters()) == before
    run.train()
    assert len(run.budget.ledger) == 2 and (tmp_path / LOG_FILE).stat().st_size == plan.log_bytes


def test_a_plan_attacks_no_mechanism_and_keeps_no_coin(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "audit_or_raise", lambda *_, **__: pytest.fail("it was audited"))
    plan = plan_of(tmp_path, audit=True, canaries=4)
    assert plan.refusals == () and plan.rows == 20
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_users_are_promised_as_users_and_their_rows_are_not_counted(tmp_path):
    rows = labelled_rows(16).add_column("user", [i // 2 for i in range(16)])
    run = ZOTrainer(
        model=one_layer(),
        args=short_args(tmp_path, expected_batch_size=4, privacy_unit_column="user", max_rows_per_unit=2),
        train_dataset=rows,
    )
    plan = run.plan()
    assert plan.rows is None and plan.units == 8 and len(plan.promises) == 1
    lines = dict(plan.as_lines())
    assert "rows" not in lines and "epsilon of a user" in lines


def test_a_run_without_privacy_is_planned_without_a_promise(tmp_path, capsys):
    plan = plan_of(tmp_path, method="mezo", noise_multiplier="absent", target_delta="absent")
    assert plan.promises == () and plan.refusals == () and plan.seconds_per_step > 0
    assert dict(plan.as_lines())["privacy"] == "none: the method adds no noise"


def test_a_head_on_features_is_planned_without_reading_a_row(write, capsys, nobody_looks):
    plan = planned(capsys, write(**HEAD, max_length=64, padded_lengths=[32, 64]))
    assert plan["refusals"] == [] and plan["seconds_reading"] > 0 and plan["seconds_per_step"] > 0


def test_the_time_of_reading_is_that_of_the_rows_that_steps_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(StopTimes, "keeping", 1.0)
    model = with_lora(classifier(num_hidden_layers=2))
    find_layers(model)[0].requires_grad_(False)
    drawn = {"expected_batch_size": 2, "max_steps": 3, "per_device_train_batch_size": 1}
    plan = plan_of(tmp_path, model=model, frozen_cache="memory", **drawn)
    assert plan.seconds_reading == pytest.approx(16 * (1 - (14 / 16) ** 3))


def test_a_plan_is_drawn(write, workplace, capsys, pictures):
    picture = workplace / "plan.png"
    plan = planned(capsys, write(), "--picture", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    plots.draw_plan({**plan, "promises": [], "seconds_per_step": None}, picture)
    assert "plan.txt: it is none of" in refused(capsys, "plan", write(), "--picture", "plan.txt")


def test_what_is_missing_and_would_help_is_said(write, monkeypatch):
    monkeypatch.setattr(planning, "find_spec", lambda name: None)
    lines = hf_dpzo.plan(write(), ["--max_steps", "1"]).as_lines()
    assert [text.partition(":")[0] for name, text in lines if name == "not installed"] == ["numba", "matplotlib"]


def test_a_step_that_cannot_be_timed_stops_no_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsing, "time_stops", lambda *_, **__: 1 / 0)
    plan = plan_of(tmp_path)
    assert plan.refusals == () and plan.seconds is None and "ZeroDivisionError" in plan.missing[0]
