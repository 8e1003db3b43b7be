"""Each command that is written down can be called, each recipe is explained, and recipes need public names alone."""

import ast
import re
from importlib.util import find_spec

import pytest
import yaml

from hf_dpzo.recipe.recipe import parse_recipe

from support.paths import ROOT


PLACES = ("*.md", "docs/*.md", "recipes/*.md", "benchmarks/*.md", "model_cards/**/*.md", "hf_dpzo/methods/*.md")
PAGES = sorted(page for pattern in PLACES for page in ROOT.glob(pattern))
SCRIPTS = sorted(ROOT.glob("benchmarks/**/*.py"))
PUBLIC = {"hf_dpzo", "hf_dpzo.privacy", "hf_dpzo.methods", "hf_dpzo.losses", "hf_dpzo.trl"}
PROGRAM = re.compile(r"(?:hf-dpzo|python3?|pip|accelerate|torchrun|ruff)\s")
FOLDERS = {"benchmarks", "docs", "examples", "hf_dpzo", "model_cards", "recipes", "tests"}
# A command reads files with these endings; it writes pictures and tables.
READ = (".cfg", ".md", ".py", ".toml", ".txt", ".yaml")
# Words that a reader replaces.
PLACEHOLDER = re.compile(r"^recipe\.yaml$|\b[A-Z]+$")


def commands(page: str) -> list[str]:
    """Return the lines of a page's shell blocks, and the commands in its text."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    inline = [code for code in re.findall(r"`([^`\n]+)`", prose) if PROGRAM.match(code)]
    return [line for block in blocks for line in block.splitlines()] + inline


def usage(script: str) -> list[str]:
    """Return the commands in the docstring of a script."""
    lines = (ast.get_docstring(ast.parse(script), clean=False) or "").splitlines()
    return [line.strip() for line in lines if line.startswith("    ") and PROGRAM.match(line.strip())]


def missing_files(command: str) -> list[str]:
    """Return the files of the repository that a command names and that do not exist.

    >>> missing_files("python benchmarks/none.py --csv out.csv && hf-dpzo train recipes/quickstart.yaml user/model")
    ['benchmarks/none.py']
    """
    words = [word.strip("\"',()") for word in command.split("#")[0].split()]
    named = [word for word in words if word.endswith(READ) or ("/" in word and word.split("/")[0] in FOLDERS)]
    return [word for word in named if not PLACEHOLDER.search(word) and not (ROOT / word).exists()]


def private_imports(source: str) -> list[str]:
    """Return the modules of hf_dpzo that a source imports and that are not public."""
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            imported += [node.module, *(name for name in inner if name.startswith("hf_dpzo.") and _is_module(name))]
    return [name for name in imported if name.split(".")[0] == "hf_dpzo" and name not in PUBLIC]


def _is_module(name: str) -> bool:
    return find_spec(name.rpartition(".")[0]).submodule_search_locations is not None and find_spec(name) is not None


# ---- Commands ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_the_commands_of_a_page_exist(page):
    assert [name for line in commands(page.read_text("utf-8")) for name in missing_files(line)] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_files_named_in_the_docstring_of_a_script_exist(script):
    assert [name for line in usage(script.read_text("utf-8")) for name in missing_files(line)] == []


def test_a_command_is_found_wherever_it_is_written():
    page = "| `python a/b.py run`, then `report` |\n\n```bash\ncd x && pip install y\n```\n\n```python\nz = 1\n```\n"
    assert commands(page) == ["cd x && pip install y", "python a/b.py run"]
    assert usage('"""What.\n\n    python a.py [n]\n    a.yaml\n"""') == ["python a.py [n]"]


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("python measure.py full", ["measure.py"]),
        ("python recipes/benchmark/benchmark.py run", ["recipes/benchmark/benchmark.py"]),
        ("hf-dpzo verify model_cards/none", ["model_cards/none"]),
        ("pip install -r requirements.txt && python -m pytest", []),
        ("hf-dpzo replay package://a/b.gguf out/x --picture steps.png --csv steps.csv user/model", []),
        ("hf-dpzo train recipes/quickstart.yaml  # As recipes/none.yaml did.", []),
    ],
)
def test_a_missing_file_is_detected(command, missing):
    assert missing_files(command) == missing


# ---- Recipes ----


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_a_recipe_is_explained_with_its_command(path):
    assert f"`hf-dpzo train recipes/{path.name}`" in (ROOT / "recipes/README.md").read_text("utf-8")


def test_the_recipe_shown_as_an_example_is_valid():
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "recipes/README.md").read_text("utf-8"), re.DOTALL)
    recipe, args = parse_recipe(yaml.safe_load(text))
    assert recipe.words == (" bad", " good")
    assert args.private


@pytest.mark.parametrize("folder", ["recipes", "examples"])
def test_scripts_for_users_import_public_packages_alone(folder):
    sources = {path: private_imports(path.read_text("utf-8")) for path in ROOT.glob(f"{folder}/**/*.py")}
    assert not {str(path.relative_to(ROOT)): names for path, names in sources.items() if names}


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("from hf_dpzo import ZOTrainer, privacy\nfrom hf_dpzo.methods import METHODS\nimport hf_dpzo.losses", []),
        ("import hf_dpzo.trainer.trainer", ["hf_dpzo.trainer.trainer"]),
        ("def main():\n    from hf_dpzo.recipe.loading import load_model", ["hf_dpzo.recipe.loading"]),
        ("from hf_dpzo import trajectory", ["hf_dpzo.trajectory"]),
        ("from hf_dpzo.privacy import noise", ["hf_dpzo.privacy.noise"]),
        ("import torch\nfrom transformers import Trainer\nfrom . import neighbour", []),
    ],
)
def test_an_import_of_an_internal_module_is_detected(source, private):
    assert private_imports(source) == private


# ---- Measurements ----


def test_every_measurement_is_listed_with_its_command():
    page = (ROOT / "benchmarks/README.md").read_text("utf-8")
    parts = {"shared.py", "attack_plans.py", "odd_rows.py", "stopwatch.py", "bases.py", "walking.py"}
    files = {path.name for path in ROOT.glob("benchmarks/*.py")} - parts
    folders = {f"{path.parent.name}/{path.name}" for path in SCRIPTS if path.stem == path.parent.name}
    assert {script.split("/")[0] for script in folders} == {path.parent.name for path in SCRIPTS} - {"benchmarks"}
    assert all(f"| `python benchmarks/{name}" in page for name in files | folders)
