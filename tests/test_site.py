"""The site's reference pages say what the code does, its examples are valid, and each page has its place."""

import dataclasses
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from transformers import TrainingArguments

from hf_dpzo import Trajectory, ZOTrainingArguments
from hf_dpzo.cli.main import main
from hf_dpzo.recipe.recipe import Recipe, read_recipe

from sections import SECTIONS, fill
from sections.api import list_members
from sections.fields import list_refusals
from sections.log_format import list_front
from sections.schemas import EXAMPLE
from sections.words import build_words
from support.paths import ROOT


DOCS = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = ROOT / "model_cards/quickstart"


def read_rows(text: str) -> dict[str, list[str]]:
    """Return the cells of each row of the tables in a text, by the name in its first cell."""
    rows = (re.split(r"(?<!\\) \| ", line.strip("| \n")) for line in text.splitlines() if line.startswith("|"))
    return {re.sub(r"^`([^`]*)`.*$", r"\1", cells[0]): cells[1:] for cells in rows}


# ---- Pages ----


def test_every_page_has_its_place_in_the_site():
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs/index.md").read_text("utf-8"), re.DOTALL)
    listed = re.findall(r"^([\w-]+)$", "\n".join(trees), re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in DOCS if page.stem != "index")


def test_every_part_that_is_made_from_the_code_is_on_one_page():
    asked = [name for page in DOCS for name in re.findall(r"<!-- generated: (.+) -->", page.read_text("utf-8"))]
    assert sorted(asked) == sorted(SECTIONS)


def test_a_part_that_nothing_makes_is_found():
    with pytest.raises(KeyError, match="the weather"):
        fill("Text.\n\n<!-- generated: the weather -->\n")


@pytest.mark.parametrize("name", ["own-csv", "chat"])
def test_the_recipe_of_a_tutorial_is_valid(name, tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / f"docs/{name}.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe, args = read_recipe(tmp_path / "recipe.yaml")
    assert args.private
    assert recipe.labels == (("no", "yes") if name == "own-csv" else ())


def test_readme_fits_on_a_screen_or_two_and_begins_with_the_commands_that_are_run_elsewhere():
    first, second, *_ = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(README.splitlines()) <= 100
    assert first.startswith("python3 -m venv .venv && ") and first.endswith("hf-dpzo train recipes/quickstart.yaml\n")
    assert second.endswith('pip install -e ".[test]" && python -m pytest -n auto --dist loadfile\n')


@pytest.mark.slow
def test_the_program_in_readme_runs_as_it_is(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=900, capture_output=True, text=True
    )
    accuracy, _, guarantee = ended.stdout.splitlines()[-1].partition(" ")
    assert float(accuracy) > 0.7 and guarantee.startswith("Guarantee(delta=1e-05")
    assert main(["verify", str(tmp_path / "out/reviews"), "--without-weights"]) == 3


# ---- Commands, fields and arguments ----


@pytest.mark.parametrize("command", ["epsilon", "calibrate", "verify", "audit", "replay"])
def test_every_option_that_a_command_shows_is_on_the_page(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    page = SECTIONS["cli"]()
    (section,) = re.findall(rf"^## `hf-dpzo {command}`\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    shown = set(re.findall(r"(?<![\w-])--[\w-]+", capsys.readouterr().out))
    assert len(shown) > 2
    assert shown <= set(re.findall(r"--[\w-]+", section))


def test_every_field_of_a_recipe_is_on_the_page_with_its_default():
    rows = read_rows(SECTIONS["recipe fields"]())
    assert {field.name for field in dataclasses.fields(Recipe)} <= set(rows)
    assert rows["max_length"][:2] == ["int", "`128`"]
    assert rows["model_name_or_path"][1] == "required"


def test_every_training_argument_is_on_the_page():
    added, inherited, refused = (
        set(read_rows(SECTIONS[f"{part} arguments"]())) - {"name", "---"} for part in ("added", "inherited", "refused")
    )
    named = {field.name for field in dataclasses.fields(ZOTrainingArguments) if field.init}
    assert named - {"hub_token"} <= added | inherited | refused
    assert not added & inherited
    assert inherited < {field.name for field in dataclasses.fields(TrainingArguments)}
    assert read_rows(SECTIONS["added arguments"]())["expected_batch_size"][1] == "`64`"


@pytest.mark.parametrize(("name", "value"), [("optim", "sgd"), ("fp16", True), ("weight_decay", -1.0)])
def test_a_refusal_on_the_page_is_the_one_that_is_raised(name, value):
    assert name in read_rows(SECTIONS["refused arguments"]())
    with pytest.raises(ValueError, match=f"^{name}=") as raised:
        ZOTrainingArguments(output_dir="out", target_epsilon=1, target_delta=1e-5, **{name: value})
    assert list_refusals()[name] in str(raised.value)


def test_the_methods_of_a_public_class_are_those_that_this_library_has_written():
    assert {"layout", "parts", "read"} <= set(list_members(Trajectory))
    assert "plan" in list_members(ZOTrainingArguments) and "to_dict" not in list_members(ZOTrainingArguments)


# ---- Formats ----


def test_a_log_can_be_read_by_the_table_of_its_bytes_alone():
    rows = {cells[-1]: [name, *cells[:-1]] for name, cells in read_rows(SECTIONS["log format"]()).items()}
    assert rows["H, the length of the header"] == ["21", "4", "uint32"]
    assert rows["SHA-256 of all bytes before it"][:2] == ["25 + H", "32"]
    assert rows["the learning rate of each of the G groups of parameters"][0] == "24"
    assert rows["the released sum of each of the K directions, in units of the lattice"][0] == "24 + 8 G"

    data, log = (CARD / "trajectory.zo").read_bytes(), Trajectory.read(CARD)
    (length,) = struct.unpack_from("<I", data, 21)
    assert json.loads(data[25 : 25 + length]) == log.header
    groups, directions = len(log.header["groups"]), log.header["num_directions"]
    size = 40 + 8 * groups + 8 * directions
    assert len(data) == 57 + length + size * len(log.records)
    for number in (0, len(log.records) - 1):
        record = data[57 + length + size * number :][:size]
        front = {name: struct.unpack_from(f"<{letter}", record, offset)[0] for offset, letter, name in list_front()}
        expected = log.records[number]
        assert front == {"step": number, "flags": 0, "smoothing": expected.smoothing, "mask": 0}
        assert struct.unpack_from(f"<{groups}d", record, 24) == expected.learning_rates
        assert struct.unpack_from(f"<{directions}q", record, 24 + 8 * groups) == expected.integers


def test_whatever_a_statement_says_is_described():
    rows = list_described(SECTIONS["privacy.json"]())
    missing = {path for path in list_paths(json.loads(EXAMPLE.read_text("utf-8")), rows) if path not in rows}
    assert not missing
    assert rows["claim.epsilon"][-1] == "`2.0`"
    assert rows["claim.unit"][-1].startswith('`"one row')


def test_a_value_of_a_statement_that_no_row_describes_would_be_found():
    assert "weather" in set(list_paths({"weather": 1}, {"claim": ["object"]}))


def list_described(page: str) -> dict[str, list[str]]:
    """Return the cells of each row by the whole path of its value; an object is described by the title of its table."""
    alone, *parts = re.split(r"^### `(\w+)`$", page, flags=re.MULTILINE)
    rows = read_rows(alone)
    for outer, part in zip(parts[::2], parts[1::2], strict=True):
        inner = read_rows(part)
        rows |= {outer: []} | {f"{outer}{'' if name[0] == '[' else '.'}{name}": inner[name] for name in inner}
    return rows


def list_paths(value: object, rows: dict[str, list[str]], path: str = "") -> Iterator[str]:
    """Yield the paths of the values in a statement, down to mappings whose names are free."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        here = f"{path}.{name}".lstrip(".")
        yield here
        is_fixed = any(row.startswith((f"{here}.", f"{here}[]")) for row in rows)
        items = inner if isinstance(inner, list) else [inner]
        if is_fixed:
            for item in items:
                yield from list_paths(item, rows, f"{here}[]" if isinstance(inner, list) else here)


def test_what_epsilon_means_is_what_the_card_of_such_a_run_says():
    card = (CARD / "README.md").read_text(encoding="utf-8")
    words = build_words()
    # It stands in the page itself, for those who read it without the site.
    assert words.strip() in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    _, guess, _, found = read_rows(words)["2"]
    assert (guess, found) == ("60 %", "3.5 %")
    assert "60.0 % of the time" in card and "3.5 % of the rows" in card
