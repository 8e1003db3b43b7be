"""`privacy.json`: of one shape, private only if every condition held, and a function of the log."""

import copy
import dataclasses
import json
import shutil

import jsonschema
import pytest
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer
from hf_dpzo.card.declarations import Declarations
from hf_dpzo.card.schema import SCHEMA_FILE, StatementError, check_statement
from hf_dpzo.card.statement import build_statement
from hf_dpzo.isolation.bound import describe_isolation, worst_isolation
from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.run import LoggedRun
from hf_dpzo.trajectory.writer import TrajectoryWriter

from support.models import one_layer, with_lora
from support.rows import labelled_rows
from support.runs import short_args


CASES = {
    "dpzero": {},
    "paper noise": {"paper_noise": True},
    "laplace": {"method": "dpzo", "noise": "laplace"},
    "aggzo": {"method": "aggzo", "num_directions": 3, "update": "adam"},
    "zopo": {"method": "zopo", "num_stages": 2, "pruning_ratio": 0.5},
    "projected": {"method": "projected", "radius": 2.0, "update": "momentum"},
    "users": {"privacy_unit_column": "user", "max_rows_per_unit": 2},
    "mezo": {"method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"},
}


@pytest.fixture(scope="module")
def train(tmp_path_factory, tokenizer):
    def run(**changes):
        args = short_args(tmp_path_factory.mktemp("run"), **changes)
        rows = labelled_rows(40)
        if args.privacy_unit_column:
            rows = rows.add_column("user", [number // 2 for number in range(40)])
        trainer = ZOTrainer(
            model=with_lora(one_layer()),
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        trainer.save_model()
        return args.output_dir

    return run


def said_in(folder) -> dict:
    with open(f"{folder}/privacy.json", encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def saved(train):
    """What a run saved. To be read alone."""
    return train()


@pytest.fixture
def folder(saved, tmp_path):
    """The same, for one test."""
    return str(shutil.copytree(saved, tmp_path / "saved"))


@pytest.mark.parametrize("case", CASES)
def test_statement_of_every_kind_of_run_has_the_shape_and_follows_from_its_log(train, case):
    folder = train(**CASES[case])
    said = said_in(folder)
    assert check_statement(said) is said
    again = json.loads(json.dumps(build_statement(folder, Declarations.from_statement(said))))
    assert again == said


def test_schema_is_a_schema():
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == schema["properties"]["schema"]["const"] == "hf-dpzo/privacy@3"


@pytest.mark.parametrize("part", ["claim", "meaning", "mechanism", "sampling"])
def test_schema_says_what_each_field_of_a_promise_is(part):
    fields = json.loads(SCHEMA_FILE.read_text())["properties"][part]["properties"]
    assert [name for name, field in fields.items() if not field.get("description")] == []


def test_every_field_is_asked_for_and_no_other_is_taken(folder):
    said = said_in(folder)

    def paths(value, path=()):
        for name in value if isinstance(value, dict) else ():
            yield (*path, name)
            yield from paths(value[name], (*path, name))

    free = {"hyperparameters", "metrics", "versions", "parameters", "update", "event"}  # By method, and by user.
    for path in paths(said):
        if free & set(path[:-1]) or path == ("software",):  # Earlier versions did not write that one.
            continue
        changed = copy.deepcopy(said)
        parent = changed
        for name in path[:-1]:
            parent = parent[name]
        del parent[path[-1]]
        with pytest.raises(StatementError):
            check_statement(changed)
        parent[path[-1]], parent["unknown"] = said, 1
        with pytest.raises(StatementError):
            check_statement(changed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("claim", "epsilon"), -1),
        (("claim", "delta"), 0),
        (("claim", "delta"), "1e-5"),
        (("claim", "neighboring_relation"), "REPLACE_ONE"),
        (("meaning", "best_membership_accuracy"), 0.4),
        (("status",), "private"),
        (("tuning", "runs_on_private_data"), 0),
        (("reproducibility", "log", "sha256"), "x"),
    ],
)
def test_wrong_values_get_one_sentence(folder, field, value):
    said = said_in(folder)
    parent = said
    for name in field[:-1]:
        parent = parent[name]
    parent[field[-1]] = value
    with pytest.raises(StatementError, match=".".join(field)):
        check_statement(said)


def test_other_versions_are_distinguished_from_this_one():
    with pytest.raises(StatementError, match="schema=hf-dpzo/privacy@99: this version knows hf-dpzo/privacy@3"):
        check_statement({"schema": "hf-dpzo/privacy@99"})


def of(folder, **declared) -> dict:
    there = Declarations.from_statement(said_in(folder))
    return build_statement(folder, dataclasses.replace(there, **declared))


FAILED_AUDIT = {"passed": False, "releases": 10, "mu_lower": 2.0, "mu_claimed": 1.0, "checks": []}


@pytest.mark.parametrize(
    "declared",
    [
        {"isolation": {"status": "not measured", "bound_in_clip_norms": None}},
        {"isolation": {"status": "bounded", "bound_in_clip_norms": 0.02}},
        {"audit": FAILED_AUDIT},
    ],
    ids=["not measured", "too coarse", "failed audit"],
)
def test_a_condition_that_was_not_held_takes_the_claim_away(folder, declared):
    said = check_statement(of(folder, **declared))
    assert (said["status"], said["claim"], said["meaning"]) == ("NOT_PRIVATE", None, None)
    assert [one["held"] for one in said["validity_checks"]["conditions"]].count(False) == 1
    assert of(folder)["status"] == "differentially_private"


def changed_log(folder, change) -> None:
    """Rewrite the log in `folder` with another header. Every checksum is right."""
    log = Trajectory.read(folder)
    header = json.loads(json.dumps(log.header))
    change(header)
    path = f"{folder}/trajectory.zo"
    writer = TrajectoryWriter.create(type(SCHEMA_FILE)(path), header)
    for record in log.records:
        writer.append(record)
    writer.close()


def test_a_delta_too_large_for_the_rows_takes_the_claim_away(folder):
    changed_log(folder, lambda header: header["plan"].update(delta=0.5))
    assert of(folder)["status"] == "NOT_PRIVATE"


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["plan"]["query"].update(noise_multiplier=9.0),
        lambda header: header["plan"]["query"].update(sampling_rate=0.001),
        lambda header: header["rows"].update(units=100_000),
        lambda header: header["method"].update(noise_multiplier=9.0),
    ],
    ids=["noise", "rate", "units", "method"],
)
def test_a_header_that_plans_for_other_releases_than_its_method_makes_is_refused(folder, change):
    changed_log(folder, change)
    with pytest.raises(TrajectoryError, match="plan: it is not of dpzero"):
        LoggedRun.from_log(Trajectory.read(folder))


def test_declared_survives_being_written_and_read(folder):
    declared = Declarations(
        isolation={"status": "bounded", "bound_in_clip_norms": 0.005},
        tuning_runs=7,
        eval_data_is_public=True,
        metrics={"eval_loss": 0.5},
        history=[{"step": 1, "eval_loss": 0.6}],
        hyperparameters={"learning_rate": 0.1},
        dataset=["imdb"],
        task="text-classification",
        repository="me/model",
        versions={"torch": "2"},
    )
    said = json.loads(json.dumps(check_statement(build_statement(folder, declared))))
    assert Declarations.from_statement(said) == declared
    assert "7 runs in all, not accounted" in said["not_covered"][1]


def test_trials_in_a_header_are_claimed(folder):
    alone = of(folder)["claim"]
    changed_log(folder, lambda header: header["plan"].update(trials=3))
    claim = check_statement(of(folder))["claim"]
    assert claim["trials"] == 3 and claim["steps_claimed"] == 3 * alone["steps_claimed"]
    assert claim["epsilon"] > alone["epsilon"] and "trials" not in alone


@pytest.mark.parametrize(
    ("runs", "accounted", "words"),
    [
        (None, False, "3 runs are accounted, and whether there were others is not told"),
        (3, True, "3 runs in all, which are accounted; what else was looked at is not"),
        (7, False, "7 runs in all, of which 3 are accounted"),
    ],
)
def test_a_card_tells_runs_that_are_accounted_from_others(folder, runs, accounted, words):
    changed_log(folder, lambda header: header["plan"].update(trials=3))
    said = check_statement(of(folder, tuning_runs=runs))
    assert said["tuning"] == {"runs_on_private_data": runs, "accounted": accounted}
    assert words in said["not_covered"][1]
    assert any("a card counts the 3 runs that it is one of" in line for line in said["not_covered"])


def test_isolation_of_a_run_is_that_of_its_worst_part():
    bitwise = describe_isolation(Isolation(loss_change=0.0), fixed_shapes=True, bound=0.0)
    some = describe_isolation(Isolation(loss_change=1e-7), fixed_shapes=True, bound=1.23e-4)
    none = describe_isolation(None, fixed_shapes=True, bound=None)
    assert some == {"status": "bounded", "bound_in_clip_norms": 0.00012}
    assert worst_isolation([bitwise, some]) == worst_isolation([some, bitwise]) == some
    assert worst_isolation([some, none, bitwise]) == none
    assert worst_isolation([some, {**some, "bound_in_clip_norms": 0.002}, some])["bound_in_clip_norms"] == 0.002
