"""The study's plan can be run, and what it trains is what the library trains."""

import csv
import sys

import pytest
import torch
import yaml

from hf_dpzo.losses.features import FeatureClassificationLoss
from hf_dpzo.methods import METHODS, PrivateMethod
from hf_dpzo.zo.directions import Rademacher

from support.paths import MEASUREMENTS


FOLDER = MEASUREMENTS / "study"
PLAN = yaml.safe_load((FOLDER / "study.yaml").read_text(encoding="utf-8"))
CONTENDERS = PLAN["contenders"]


@pytest.fixture(scope="module")
def study():
    """The study, whose rows are random and can be told apart by one feature."""
    sys.path.insert(0, str(FOLDER))
    import head_runs
    import study
    import study_results
    import task_rows

    yield study, head_runs, task_rows, study_results
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def rows(study):
    _, _, features, _ = study
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (200,), generator=generator)
    values = torch.randn((200, 8), generator=generator)
    values[:, 0] += 4.0 * labels - 2
    return features.Table(features=torch.nn.functional.normalize(values, dim=1), labels=labels)


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_learns_at_a_large_epsilon(study, rows, name):
    module, heads, _, _ = study
    run = module.Study(PLAN).build(name, "equal-steps", epsilon=1000, rate=1.0, seed=1)
    head = run.train(rows, 2)
    if "pruning_ratio" in CONTENDERS[name]:  # It need not keep what tells the rows apart.
        assert head.classifier.weight.any()
    else:
        assert heads.measure_accuracy(head, rows) > 0.8


def test_the_quick_start_is_repeated_with_the_settings_of_its_recipe(study, rows, monkeypatch):
    import repeat

    _, heads, features, _ = study
    runs, table = [], features.Table(features=rows.features.repeat(16, 1), labels=rows.labels.repeat(16))
    train = heads.Run.train
    monkeypatch.setattr(heads.Run, "train", lambda run, *rows: runs.append(run) or train(run, *rows))
    task = features.TaskRows(train=table, tuning=rows[:0], test=rows, untouched=0.5)
    assert min(repeat.repeat(task, repeat.RECIPE, [], 2)) > 0.8
    repeat.repeat(task, repeat.RECIPE, ["--target_epsilon", "0.2"], 1)
    recipe = yaml.safe_load(repeat.RECIPE.read_text(encoding="utf-8"))
    for run in runs:
        assert run.contender == {name: recipe[name] for name in run.contender} and run.steps == recipe["max_steps"]
        assert run.delta == float(recipe["target_delta"]) and run.batch is None
    assert [run.seed for run in runs] == [0, 1, 0] and [run.epsilon for run in runs] == [2.0, 2.0, 0.2]
    assert {run.learning_rate for run in runs} == {recipe["learning_rate"]}
    assert repeat.fit_without_privacy(task, 2) > 0.8
    with pytest.raises(ValueError, match="expected_batch_size=8: heads are trained on all rows here"):
        repeat.repeat(task, repeat.RECIPE, ["--expected_batch_size", "8"], 1)


def test_every_private_method_is_a_contender():
    private = {name for name, method in METHODS.items() if issubclass(method, PrivateMethod)}
    assert private <= {settings["method"] for settings in CONTENDERS.values()}


def test_a_step_is_that_of_the_released_coefficients(study, rows):
    _, heads, _, _ = study
    run = heads.Run(
        contender={"method": "mezo", "num_directions": 3, "smoothing": 0.1},
        steps=1,
        batch=None,
        learning_rate=0.5,
        epsilon=None,
        delta=1e-5,
        seed=4,
    )
    moved = run.train(rows, 2).classifier.weight.detach()
    # The same step by hand: one loss for each row at each point, and their mean differences.
    head = heads.build_head(8, 2)
    directions = Rademacher(seed=4, sizes=[16, 2])
    expected = torch.zeros(2, 8)
    for k in range(3):
        weight, bias = torch.zeros(2, 8), torch.zeros(2)
        directions.add_(weight, index=0, step=0, weights={k: 1.0})
        directions.add_(bias, index=1, step=0, weights={k: 1.0})
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                head.classifier.weight.copy_(0.1 * sign * weight)
                head.classifier.bias.copy_(0.1 * sign * bias)
            losses.append(FeatureClassificationLoss(head)(head, {"features": rows.features, "labels": rows.labels}))
        expected -= 0.5 * ((losses[0] - losses[1]) / 0.2).mean() / 3 * weight
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_the_recorded_table_is_that_of_the_recorded_runs(study):
    module, _, _, tables = study
    if not module.TABLE.exists():
        pytest.fail("results.csv: the study has no recorded runs.")
    with module.TABLE.open(encoding="utf-8") as file:
        found = [
            {**row, "accuracy": float(row["accuracy"]), "epsilon": float(row["epsilon"]) if row["epsilon"] else None}
            for row in csv.DictReader(file)
        ]
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    report = tables.format_report(tables.Results(rows=found, untouched={}), PLAN)
    lines = [line for line in report.splitlines() if line.startswith("|")]
    assert lines
    assert [line for line in lines if line not in text] == []
