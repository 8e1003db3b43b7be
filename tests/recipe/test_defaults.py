"""What a task chooses where neither its recipe nor a flag says anything."""

import math
from dataclasses import replace

import pytest

from hf_dpzo.arguments.rates import choose_learning_rate
from hf_dpzo.cli.main import main
from hf_dpzo.recipe.defaults import TrainingDefaults
from hf_dpzo.recipe.recipe import parse_recipe, read_recipe
from hf_dpzo.recipe.run import build_trainer
from hf_dpzo.recipe.tasks import TASKS
from hf_dpzo.recipe.tasks.prompt_classification import ADAPTER_DEFAULTS
from hf_dpzo.trajectory.log import Trajectory

from support.recipes import table


FIELDS = {
    "model_name_or_path": "model",
    "data": "rows.csv",
    "label_words": {0: " bad", 1: " good"},
    "target_epsilon": 2,
    "target_delta": "1e-5",
    "output_dir": "out",
}


HEAD = TrainingDefaults(
    method="aggzo",
    expected_batch_size="all",
    num_directions=64,
    clip=0.4,
    smoothing=0.1,
    learning_rate=20.0,
    most_noise=16,
    max_steps=60,
)


@pytest.fixture
def head(monkeypatch):
    """The defaults of prompts, replaced by others."""
    monkeypatch.setattr(type(TASKS["prompt-classification"]), "defaults", lambda task, recipe: HEAD)


def parse(flags=(), **changes):
    fields = {name: value for name, value in {**FIELDS, **changes}.items() if value != "absent"}
    return parse_recipe(fields, flags)


def chosen(flags=(), **changes):
    return parse(flags, **changes)[0].chosen


def test_a_task_chooses_what_nobody_set(head):
    recipe, args = parse()
    assert (args.method, args.expected_batch_size, args.num_directions, args.clip_norm) == ("aggzo", "all", 64, 0.05)
    assert (args.smoothing, args.learning_rate, args.max_steps) == (0.1, 20, 60)
    assert {*recipe.chosen} == {
        "method", "expected_batch_size", "num_directions", "clip_norm", "smoothing", "learning_rate", "max_steps"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "changes"),
    [([], {"learning_rate": "1e-1"}), (["--learning_rate", "1e-1"], {}), (["--learning-rate=0.1"], {})],
)
def test_what_a_recipe_or_a_flag_sets_is_kept(head, flags, changes):
    recipe, args = parse(flags, **changes)
    assert args.learning_rate == 0.1 and "learning_rate" not in recipe.chosen and args.smoothing == 0.1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_directions": 16}, {"clip_norm": 0.1}),
        ({"method": "dpzero"}, {"clip_norm": 0.4, "num_directions": None}),
        ({"method": "zoso", "num_directions": 4}, {"clip_norm": 0.4}),
        # It bounds the difference of two losses, which are 2 * 0.1 apart.
        ({"method": "dpzo"}, {"clip_norm": 0.08, "num_directions": None}),
        ({"method": "dpzo", "difference": "forward", "smoothing": 0.2}, {"clip_norm": 0.08}),
        ({"method": "projected", "radius": 1}, {"clip_norm": 0.05, "num_directions": 64}),
        (
            {"method": "mezo", "target_epsilon": "absent", "target_delta": "absent"},
            {"clip_norm": None, "num_directions": None, "smoothing": 0.1},
        ),
        ({"num_train_epochs": 2}, {"max_steps": -1}),
        ({"update": "adam"}, {"learning_rate": None}),
    ],
    ids=str,
)
def test_a_choice_suits_what_was_set(head, changes, expected):
    _, args = parse(**changes)
    assert {name: getattr(args, name) for name in expected} == pytest.approx(expected)


def test_what_the_task_chose_is_part_of_the_recipe_that_is_kept(head, monkeypatch):
    recipe, args = parse()
    monkeypatch.undo()  # As in a version with other defaults.
    again, args_again = parse_recipe({}, recipe.movable_flags)
    assert args_again.planned_values == args.planned_values and again.chosen == {}


def test_adapters_for_prompts_have_defaults_of_their_own_and_all_parameters_have_stocks():
    assert chosen()["learning_rate"] == ADAPTER_DEFAULTS["lora"].learning_rate
    activated = chosen(adapter="activated-lora", template="{text} It was")
    assert activated["num_directions"] == 32 and activated["clip_norm"] == pytest.approx(0.09 / 32**0.5)
    assert chosen(adapter="none") == {}
    chat = {"task": "chat", "label_words": "absent"}
    answers = chosen(**chat, adapter="activated-lora")
    assert answers["num_directions"] == 32 and answers["clip_norm"] == pytest.approx(0.3 / 32**0.5)
    assert chosen(**chat, adapter="lora") == {}
    assert chosen(task="causal-lm", label_words="absent") == {}


def test_a_run_says_what_its_task_chose_and_its_log_holds_it(write, workplace, capsys, monkeypatch):
    monkeypatch.setattr(type(TASKS["prompt-classification"]), "defaults", lambda task, recipe: HEAD)
    path = write(method="absent", expected_batch_size="absent", smoothing="absent")
    assert main(["train", path, "--num_directions", "2"]) == 0
    said = table(capsys.readouterr().out)["chosen by the task"]
    assert said == "method=aggzo, expected_batch_size=all, smoothing=0.1, learning_rate=20, clip_norm=0.282843"
    header = Trajectory.read(workplace / "out").header
    assert header["rows"]["expected_batch_size"] == header["rows"]["rows"] == 70
    assert header["plan"]["query"]["sampling_rate"] == 1 and header["method"]["smoothing"] == 0.1
    assert main(["verify", str(workplace / "out"), "--base", str(workplace / "causal")]) == 0


@pytest.mark.parametrize("noise, lowered", [(1, False), (300, True)])
def test_the_rate_of_a_task_is_lowered_where_noise_is_too_much_for_it(write, workplace, monkeypatch, noise, lowered):
    monkeypatch.setattr(type(TASKS["prompt-classification"]), "defaults", lambda task, recipe: HEAD)
    path = write(method="absent", expected_batch_size="absent", smoothing="absent", max_steps=1)
    recipe, args = read_recipe(path, ["--num_directions", "2", "--noise_multiplier", str(noise)])
    build_trainer(recipe, args)
    method, budget = args.plan(70)
    most = 16 * choose_learning_rate(method, steps=budget.planned_steps, update=args.update_rule)
    assert (most < 20) == lowered
    assert args.learning_rate == recipe.chosen["learning_rate"] == pytest.approx(min(20, most), rel=0.01)


def test_a_run_that_goes_on_keeps_the_rate_that_it_began_with(write, workplace, monkeypatch):
    task = type(TASKS["prompt-classification"])
    monkeypatch.setattr(task, "defaults", lambda task, recipe: replace(HEAD, most_noise=math.inf))
    flags = ["--num_directions", "2", "--noise_multiplier", "300"]
    path = write(method="absent", expected_batch_size="absent", smoothing="absent", max_steps=1)
    assert main(["train", path, *flags]) == 0
    monkeypatch.setattr(task, "defaults", lambda task, recipe: HEAD)
    recipe, args = read_recipe(path, [*flags, "--resume_from_checkpoint", "true"])
    build_trainer(recipe, args)
    assert args.learning_rate == 20


def test_noise_may_carry_an_adapter_less_far_than_a_head(write):
    path = write(expected_batch_size="absent", smoothing="absent", learning_rate="absent", max_steps=1)
    recipe, args = read_recipe(path, ["--noise_multiplier", "3000"])
    build_trainer(recipe, args)
    method, budget = args.plan(70)
    rate = choose_learning_rate(method, steps=budget.planned_steps, update=args.update_rule)
    assert args.learning_rate == pytest.approx(4 * rate, rel=0.01) and args.learning_rate < 1e-2
