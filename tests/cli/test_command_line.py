"""The command line as a whole: what it lists, how soon it answers, and how a shell completes it."""

import argparse
import importlib
import itertools
import json
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest
from peft import TaskType

from hf_dpzo import __version__
from hf_dpzo.arguments.training_args import ZOTrainingArguments
from hf_dpzo.arguments.unsupported import ALWAYS_REFUSED
from hf_dpzo.cli.main import COMMANDS, build_parser, main
from hf_dpzo.cli.quiet import quiet_warnings
from hf_dpzo.recipe.help import format_help, list_fields
from hf_dpzo.recipe.recipe import Recipe

from support.models import causal_lm, with_lora


# A value of each flag that is never taken, other than its default.
REFUSED_VALUES = {
    "auto_find_batch_size": True,
    "dataloader_drop_last": True,
    "debug": "underflow_overflow",
    "fsdp": True,
    "gradient_accumulation_steps": 2,
    "hub_token": "x",
    "include_num_input_tokens_seen": "all",
    "label_smoothing_factor": 0.1,
    "max_grad_norm": 1.0,
    "neftune_noise_alpha": 5.0,
    "optim": "sgd",
    "save_on_each_node": True,
    "skip_memory_metrics": False,
    "train_sampling_strategy": "group_by_length",
    "use_liger_kernel": True,
}


def test_the_list_of_commands_says_of_each_what_it_says_itself():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for name in COMMANDS:
        importlib.import_module(f"hf_dpzo.cli.{name.replace('-', '_')}").add_command(commands)
    assert {action.dest: action.help for action in commands._choices_actions} == COMMANDS


@pytest.mark.parametrize(
    ("words", "slow"),
    [(["--help"], ["numpy"]), (["train", "none.yaml"], ["pandas"]), (["plan", "none.yaml"], ["datasets"])],
)
def test_help_and_a_missing_recipe_import_no_library_that_takes_time(words, slow):
    script = (
        "import sys, json\nfrom hf_dpzo.cli.main import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        f"print(json.dumps([m for m in ['torch', 'dp_accounting', 'transformers', *{slow}] if m in sys.modules]))"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert json.loads(printed.stdout.splitlines()[-1]) == []


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"hf-dpzo {__version__}\n")


def test_all_fields_are_listed_once_but_those_that_are_always_refused():
    listed = [action.dest for _, action in list_fields()]
    wanted = {entry.name for kind in (Recipe, ZOTrainingArguments) for entry in fields(kind) if entry.init}
    assert len(listed) == len({*listed})
    assert {*listed} == wanted - ALWAYS_REFUSED


def test_groups_stand_together_and_none_is_empty():
    groups = [group for group, _ in list_fields()]
    assert len({*groups}) == 1 + sum(one != other for one, other in itertools.pairwise(groups))
    assert "privacy" in groups and "\nprivacy:\n" in format_help()


# Where DeepSpeed is not installed, transformers refuses it first.
@pytest.mark.parametrize("name", sorted(ALWAYS_REFUSED - {"deepspeed"}))
def test_a_flag_that_is_not_listed_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        ZOTrainingArguments(
            output_dir=str(tmp_path),
            **{name: REFUSED_VALUES[name]},
            noise_multiplier=1.0,
            target_delta=1e-5,
            max_steps=1,
        )


def test_a_shell_completes_the_fields_of_a_recipe(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "--target_epsilon" in script and "--rows_per_person" in script and "push-log" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=30)


def test_only_a_command_that_is_called_has_flags():
    quiet = next(action for action in build_parser([None])._actions if action.dest == "command")
    assert all(len(parser._actions) == 1 for parser in quiet.choices.values())


def test_recipes_are_listed_shown_copied_and_run_by_name(tmp_path, capsys):
    assert main(["recipe"]) == 0
    assert capsys.readouterr().out.startswith("adapter ")
    assert main(["recipe", "quickstart"]) == 0
    shown = capsys.readouterr().out
    assert "target_epsilon: 2" in shown
    copy = tmp_path / "mine.yaml"
    assert main(["recipe", "quickstart", "--output", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == shown
    assert main(["recipe", "quickstart", "--output", str(copy)]) == 2
    assert "the file exists" in capsys.readouterr().err
    assert main(["train", "quickstart", "--smoothing", "-1"]) == 2
    assert "smoothing" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["recipe", "nothing"], ["train", "nothing"]])
def test_an_unknown_recipe_is_answered_by_the_names_there_are(capsys, command):
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "recipe=nothing" in error and "quickstart" in error and error.count("\n") == 1


def test_what_nobody_can_do_anything_about_is_not_shown():
    """PEFT asks a model for a name that is going away; a base that is no folder has no vocabulary to look for."""
    base = causal_lm()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with_lora(base, TaskType.CAUSAL_LM)
    assert "is_gradient_checkpointing" in str(shown[0].message)  # When it does not, the filter goes.
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet_warnings():
            with_lora(causal_lm(), TaskType.CAUSAL_LM)
            said = "Could not find a config file in a/b - will assume that the vocabulary was not modified."
            warnings.warn(said, stacklevel=1)
            warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in shown] == ["another"]
