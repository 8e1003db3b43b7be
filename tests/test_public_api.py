"""Five packages are public: each of their names is documented, and recipes, pages and cards use no other."""

import ast
import dataclasses
import doctest
import functools
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from transformers import TrainingArguments

from hf_dpzo.cli.main import main
from hf_dpzo.privacy import Budget, Plan, calibrate, group_epsilon, guarantee
from hf_dpzo.privacy.rounding import round_up

from support.paths import ROOT


PUBLIC = ("hf_dpzo", "hf_dpzo.privacy", "hf_dpzo.methods", "hf_dpzo.losses", "hf_dpzo.trl")
NAMES = {package: importlib.import_module(package).__all__ for package in PUBLIC}
OBJECTS = {
    f"{package}.{name}": getattr(importlib.import_module(package), name)
    for package in PUBLIC
    for name in NAMES[package]
}
# Values have no docstring; docs/python.md says what they are.
VALUES = {"hf_dpzo.PUBLIC_TEXTS", "hf_dpzo.__version__", "hf_dpzo.privacy.Query", "hf_dpzo.methods.METHODS"}
FUNCTIONS = [name for name, value in OBJECTS.items() if inspect.isfunction(value)]
CLASSES = [name for name, value in OBJECTS.items() if inspect.isclass(value)]
# Beginnings of sentences that say what a thing is, instead of what a function does.
NO_VERB = re.compile(r"(?i:the|a|an|of|one|what|whether|where|how|when|that|this|from|for|all)\b|\w+(?:ing|ed)\b")
PLAN = {"target_delta": 1e-5, "num_rows": 5000, "expected_batch_size": 64, "max_steps": 100}
FLAGS = [text for name, value in PLAN.items() for text in (f"--{name}", str(value))]


# ---- Docstrings ----


def test_a_public_name_is_a_function_a_class_or_a_known_value():
    assert {*FUNCTIONS, *CLASSES} == set(OBJECTS) - VALUES


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_a_public_name_has_a_docstring_of_its_own_that_help_shows(name):
    named = OBJECTS[name]
    text = vars(named)["__doc__"] if inspect.isclass(named) else named.__doc__
    first = text.splitlines()[0]
    assert first.endswith(".")
    assert not text.startswith(f"{named.__name__}("), "a dataclass that nobody has described"
    assert first in pydoc.render_doc(named, renderer=pydoc.plaintext)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_does_and_what_it_takes(name):
    text = OBJECTS[name].__doc__
    assert not NO_VERB.match(text)
    assert description(text) == set(inspect.signature(OBJECTS[name]).parameters)


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_method_is_described(name):
    for owner in OBJECTS[name].__mro__:
        if owner.__module__.startswith("hf_dpzo."):
            for method, member in methods_of(owner):
                assert inspect.getdoc(member), f"{owner.__name__}.{method}"


@pytest.mark.parametrize("name", [name for name in CLASSES if dataclasses.is_dataclass(OBJECTS[name])])
def test_every_field_of_a_dataclass_is_described(name):
    fields = {field.name: field for field in dataclasses.fields(OBJECTS[name]) if field.init}
    if issubclass(OBJECTS[name], TrainingArguments):
        assert all(fields[field].metadata["help"] for field in OBJECTS[name].__annotations__)
    else:
        assert description(vars(OBJECTS[name])["__doc__"]) == set(fields)


@pytest.mark.parametrize("name", [name for name in [*FUNCTIONS, *CLASSES] if name.startswith("hf_dpzo.privacy.")])
def test_a_planning_name_has_an_example(name):
    assert doctest.DocTestParser().get_examples(OBJECTS[name].__doc__)


def description(text: str) -> set[str]:
    """Return the names in a docstring's section of arguments."""
    section = re.search(r"^ *Args:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return set() if section is None else set(re.findall(r"^ {8}(\w+): ", section[1], re.MULTILINE))


def methods_of(owner: type) -> Iterator[tuple[str, object]]:
    kinds = (property, classmethod, staticmethod, functools.cached_property)
    for name, member in vars(owner).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, kinds)):
            yield name, member


# ---- The page ----


def test_the_page_lists_every_public_name_and_no_other():
    sections = re.split(r"^## `(\S+)`$", page("docs/python.md"), flags=re.MULTILINE)[1:]
    listed = {}
    for package, text in zip(sections[::2], sections[1::2], strict=True):
        heads = re.findall(r"^- (.*?):", text, re.MULTILINE)
        listed[package] = {name for head in heads for name in re.findall(r"`(\w+)`", head)}
    assert listed == {package: set(names) for package, names in NAMES.items()}


def test_the_examples_of_the_page_pass():
    assert doctest.testfile(str(ROOT / "docs/python.md"), module_relative=False) == doctest.TestResults(0, 9)


# ---- Planning in Python, and on the command line ----


def test_planning_in_python_needs_neither_torch_nor_transformers():
    run = f"dict({', '.join(f'{name}={value}' for name, value in PLAN.items())}, noise_multiplier=1.2)"
    code = (
        "import sys; from hf_dpzo.privacy import Budget, Plan, calibrate, compute_curve, group_epsilon, guarantee\n"
        f"run = {run}\n"
        "assert guarantee(**run).epsilon < group_epsilon(rows_per_person=2, **run)\n"
        "assert len(compute_curve(Plan(**run), 'max_steps', [50]).points) == 2\n"
        "query = calibrate(target_epsilon=2.0, target_delta=1e-5, num_rows=50, expected_batch_size=50, max_steps=1)\n"
        "assert Budget(query=query, planned_steps=1, delta=1e-5).guarantee().epsilon <= 2\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets', 'opendp', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_python_and_the_command_line_state_the_same_epsilon(noise, capsys):
    run = {"noise": noise, "noise_multiplier": 1.2, **PLAN}
    assert main(["epsilon", "--noise", noise, "--noise_multiplier", "1.2", "--rows_per_person", "3", *FLAGS]) == 0
    table = printed(capsys)
    assert table["epsilon"] == f"{round_up(guarantee(**run).epsilon):g}"
    group_lines = table[
        "epsilon of 3 rows of a person" if noise == "gaussian" else "pure epsilon of 3 rows of a person"
    ]
    assert group_lines == f"{round_up(group_epsilon(rows_per_person=3, **run)):g}"


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_python_and_the_command_line_ask_for_the_same_noise(noise, capsys):
    assert main(["calibrate", "--noise", noise, "--target_epsilon", "2", *FLAGS]) == 0
    query = calibrate(noise=noise, target_epsilon=2.0, **PLAN)
    assert printed(capsys)["noise multiplier"] == f"{query.noise_multiplier:.6g}"
    spent = guarantee(noise=noise, noise_multiplier=query.noise_multiplier, **PLAN)
    assert 1.9 < (spent.pure or spent.epsilon) <= 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": "uniform"}, "noise=uniform: it is none of gaussian and laplace"),
        ({"max_steps": 10.5}, "max_steps=10.5: there is no part of a step"),
        ({"max_steps": 0}, "max_steps=0: there must be at least one step"),
        ({"target_delta": 1e-3}, "target_delta=0.001: with 5000 rows"),
        ({"expected_batch_size": 5001}, "expected_batch_size=5001: with 5000 rows"),
        ({"noise_multiplier": 0.01}, "more than 1000 promises nothing"),
        ({"rows_per_person": 65}, "rows_per_person=65: it must lie between 1 and 64"),
        ({"rows_per_person": 1.5}, "rows_per_person=1.5: it must lie between 1 and 64"),
    ],
    ids=str,
)
def test_settings_that_no_run_could_have_are_refused(change, message):
    question = group_epsilon if "rows_per_person" in change else guarantee
    with pytest.raises(ValueError, match=re.escape(message)):
        question(**{"noise_multiplier": 1.2, **PLAN, **change})


def test_a_budget_counts_whole_steps():
    query = Plan(noise_multiplier=1.2, **PLAN).query
    with pytest.raises(ValueError, match=r"planned_steps=10.5, trials=1: steps and runs are counted whole"):
        Budget(query=query, planned_steps=10.5, delta=1e-5)


def printed(capsys) -> dict[str, str]:
    return {line.split("  ")[0]: line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()}


# ---- Scripts, pages and docstrings use public names alone ----


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


SCRIPTS = [path for folder in ("recipes", "examples") for path in sorted(ROOT.glob(f"{folder}/**/*.py"))]
PATTERNS = ("README.md", "CHANGELOG.md", "docs/*.md", "model_cards/**/*.md", "hf_dpzo/*/*.md")
PAGES = [str(path.relative_to(ROOT)) for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]


def test_recipes_and_examples_use_public_names_alone():
    uses = {str(path.relative_to(ROOT)): internal_uses(path.read_text(encoding="utf-8")) for path in SCRIPTS}
    assert {path: found for path, found in uses.items() if found} == {}


@pytest.mark.parametrize("name", PAGES)
def test_code_in_a_page_uses_public_names_alone(name):
    blocks = re.findall(r"^```python\n(.*?)^```", page(name), re.DOTALL | re.MULTILINE)
    assert [use for block in blocks for use in internal_uses(examples_in(block) or block)] == []


@pytest.mark.parametrize("name", PAGES)
def test_names_in_the_prose_of_a_page_are_public(name):
    named = re.findall(r"`(hf_dpzo(?:\.\w+)+)", page(name))
    assert [dotted for dotted in named if not is_public(dotted)] == []


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_examples_in_public_docstrings_use_public_names_alone(name):
    assert internal_uses(examples_in(OBJECTS[name].__doc__)) == []


@pytest.mark.parametrize(
    "code",
    [
        "from hf_dpzo.privacy.ledger import Budget",
        "from hf_dpzo.privacy import ledger",
        "from hf_dpzo import scaled_clip_norm",
        "import hf_dpzo.zo",
        "import hf_dpzo\nhf_dpzo.trainer.trainer.ZOTrainer",
        "def later():\n    from hf_dpzo.step.descent import Descent",
    ],
)
def test_an_internal_name_is_detected(code):
    assert len(internal_uses(code)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "from hf_dpzo import ZOTrainer, methods",
        "import hf_dpzo.privacy as privacy",
        "import hf_dpzo\nhf_dpzo.verify('x')\nhf_dpzo.methods.METHODS['mezo']",
        "from torch import nn",
    ],
)
def test_a_public_name_is_accepted(code):
    assert internal_uses(code) == []


def examples_in(text: str) -> str:
    """Return the code of the doctest examples in a text, without their output."""
    return "".join(example.source for example in doctest.DocTestParser().get_examples(text))


def internal_uses(code: str) -> list[str]:
    """Return the names of this library in `code` that are not public."""
    return [dotted for dotted in used_names(ast.parse(code)) if not is_public(dotted)]


def used_names(tree: ast.AST) -> Iterator[str]:
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) and node not in inner else []
        yield from (name for name in names if name.split(".")[0] == "hf_dpzo")


def is_public(dotted: str) -> bool:
    """Return whether a name is a public package, a public name in one, or an attribute of such a name."""
    if dotted in PUBLIC:
        return True
    parts = dotted.split(".")
    package = max((one for one in PUBLIC if f"{dotted}.".startswith(f"{one}.")), key=len)
    return parts[package.count(".") + 1] in NAMES[package]
