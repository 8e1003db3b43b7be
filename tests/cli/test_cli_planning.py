"""`hf-dpzo epsilon` and `calibrate` as a user types them: curves as pictures and as tables."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dpzo.cli.main import main
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.interpretation import membership_accuracy
from hf_dpzo.privacy.queries import QUERIES
from hf_dpzo.privacy.rounding import round_up


PLAN = ["--target_delta", "1e-5", "--num_rows", "5000", "--expected_batch_size", "64", "--max_steps", "100"]
EPSILON = ["epsilon", "--noise_multiplier", "1.2", *PLAN]
CALIBRATE = ["calibrate", "--noise", "laplace", "--target_epsilon", "2", *PLAN]
COLUMNS = [
    *("noise", "noise_multiplier", "sampling_rate", "expected_batch_size", "max_steps", "num_rows", "target_delta"),
    *("target_epsilon", "epsilon", "epsilon_pld", "epsilon_rdp", "epsilon_pure", "best_membership_accuracy"),
]


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def printed(capsys) -> dict[str, str]:
    return {line.split("  ")[0]: line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()}


def follows_from_its_own_columns(line: dict[str, str]) -> None:
    query = QUERIES[line["noise"]](
        noise_multiplier=float(line["noise_multiplier"]),
        sampling_rate=int(line["expected_batch_size"]) / int(line["num_rows"]),
    )
    assert query.sampling_rate == float(line["sampling_rate"])
    releases, delta = ((query, int(line["max_steps"])),), float(line["target_delta"])
    spent = account(releases, delta=delta)
    assert float(line["best_membership_accuracy"]) == round_up(membership_accuracy(releases, delta=delta))
    for name, bound in (("", spent.epsilon), ("_pld", spent.pld), ("_rdp", spent.rdp), ("_pure", spent.pure)):
        assert line[f"epsilon{name}"] == ("" if bound is None else str(round_up(bound)))


@pytest.mark.parametrize("against", ["max_steps", "expected_batch_size", "noise_multiplier"])
@pytest.mark.parametrize("noise", list(QUERIES))
def test_epsilon_can_be_drawn_against_each_flag(tmp_path, capsys, noise, against):
    picture, table = tmp_path / "curve.png", tmp_path / "curve.csv"
    files = ["--picture", str(picture), "--csv", str(table), "--points", "3"]
    assert main([*EPSILON, "--noise", noise, "--against", against, *files]) == 0
    said, lines = printed(capsys), lines_of(table)
    assert said["curve"].startswith(f"3 points, {against} from ")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert float(said["epsilon"]) == float(lines[1]["epsilon"])
    for line in lines:
        follows_from_its_own_columns(line)


@pytest.mark.parametrize("against", ["max_steps", "expected_batch_size", "target_epsilon"])
def test_the_noise_of_a_target_can_be_drawn_against_each_flag(tmp_path, capsys, against):
    table, picture = tmp_path / "curve.csv", tmp_path / "curve.svg"
    assert main([*CALIBRATE, "--against", against, "--csv", str(table), "--picture", str(picture)]) == 0
    said, lines = printed(capsys), lines_of(table)
    assert picture.stat().st_size > 5000
    assert float(lines[3]["noise_multiplier"]) == pytest.approx(float(said["noise multiplier"]), rel=1e-5)
    for line in lines:
        follows_from_its_own_columns(line)
        assert float(line["epsilon_pure"]) <= round_up(float(line["target_epsilon"]))


def test_the_noise_of_gaussian_targets_can_be_drawn(tmp_path, capsys):
    plan = ["--target_delta", "1e-5", "--num_rows", "5000", "--expected_batch_size", "5000", "--max_steps", "1"]
    table = tmp_path / "curve.csv"
    flags = ["--against", "target_epsilon", "--points", "3", "--csv", str(table)]
    assert main(["calibrate", "--target_epsilon", "2", *plan, *flags]) == 0
    lines = lines_of(table)
    assert [line["target_epsilon"] for line in lines] == ["0.5", "2.0", "8.0"]
    for line in lines:
        follows_from_its_own_columns(line)
        assert float(line["epsilon"]) <= float(line["target_epsilon"])


def test_a_range_is_kept_to(tmp_path, capsys):
    table = tmp_path / "curve.csv"
    flags = ["--against", "max_steps", "--from", "50", "--to", "400", "--points", "4", "--csv", str(table)]
    assert main([*EPSILON, *flags]) == 0
    assert [line["max_steps"] for line in lines_of(table)] == ["50", "100", "200", "400"]
    assert printed(capsys)["curve"] == "4 points, max_steps from 50 to 400"


def test_what_is_left_out_is_said(tmp_path, capsys):
    table = tmp_path / "curve.csv"
    flags = ["--against", "noise_multiplier", "--from", "0.001", "--points", "4", "--csv", str(table)]
    assert main([*EPSILON, *flags]) == 0
    assert len(lines_of(table)) == 3
    assert "2 left out, for which no epsilon can be stated" in printed(capsys)["curve"]


def test_files_of_the_same_name_are_replaced(tmp_path, capsys):
    table = tmp_path / "curve.csv"
    table.write_text("old")
    assert main([*EPSILON, "--against", "max_steps", "--points", "2", "--csv", str(table)]) == 0
    assert len(lines_of(table)) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--against", "max_steps"], "against=max_steps: there is nowhere to put the curve; add --picture or --csv."),
        (["--picture", "x.png"], "picture=x.png: it is for a curve; say with --against"),
        (["--csv", "x.csv"], "csv=x.csv: it is for a curve"),
        (["--from", "3"], "from=3.0: it is for a curve"),
        (["--to", "3"], "to=3.0: it is for a curve"),
        (["--points", "0"], "points=0: it is for a curve"),
        (["--against", "max_steps", "--picture", "x.txt"], "picture=x.txt: it is none of .png, .svg and .pdf"),
        (["--against", "max_steps", "--picture", "/nowhere/x.png"], "picture=/nowhere/x.png: there is no such folder"),
        (["--against", "max_steps", "--csv", "x.txt"], "csv=x.txt: it does not end in .csv"),
        (["--against", "max_steps", "--csv", "/nowhere/x.csv"], "csv=/nowhere/x.csv: there is no such folder"),
        (["--against", "max_steps", "--csv", "x.csv", "--from", "200"], "from=200, to=1000: max_steps lies between"),
        (["--against", "max_steps", "--csv", "x.csv", "--points", "1"], "points=1: a curve has between 2 and 200"),
        (["--against", "max_steps", "--csv", "x.csv", "--rows_per_person", "2"], "rows_per_person=2: a curve is for"),
    ],
    ids=str,
)
def test_bad_curves_get_one_sentence_before_any_work(tmp_path, monkeypatch, capsys, flags, message):
    def worked(*args, **kwargs):
        raise AssertionError("it worked first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_dpzo.privacy.planning.account", worked)
    assert main([*EPSILON, *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hf-dpzo: {message}")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_command_curves_against_flags_of_its_own(capsys):
    with pytest.raises(SystemExit):
        main([*CALIBRATE, "--against", "noise_multiplier", "--csv", "x.csv"])
    assert "invalid choice: 'noise_multiplier'" in capsys.readouterr().err


def test_planning_needs_neither_torch_nor_transformers_nor_matplotlib(tmp_path):
    flags = ["--against", "max_steps", "--points", "2", "--csv", str(tmp_path / "curve.csv")]
    code = (
        f"import sys; from hf_dpzo.cli.main import main; assert main({[*EPSILON, *flags]!r}) == 0; "
        "assert not {'torch', 'transformers', 'matplotlib', 'peft', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
