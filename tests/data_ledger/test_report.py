"""The report is one file that says in words what holds, and what does not, and runs nothing."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_dpzo.cli.main import main
from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.data_ledger.report import render_report
from hf_dpzo.data_ledger.summary import Summary
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.rounding import round_up

from support.ledgers import NO_NOISE, QUERY, enter
from support.recipes import refused


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "onload", "onclick")]

    def handle_data(self, data):
        self.text += f" {data}"


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "data.ledger"


@pytest.fixture
def ledger(path) -> DataLedger:
    return DataLedger(path, create=True)


def report(ledger: DataLedger) -> Reader:
    return Reader(render_report(Summary.of(ledger), Path("report.html")))


HOSTILE = "/models/<script>alert(1)</script>\N{RIGHT-TO-LEFT OVERRIDE}\x1b[2J'\"&amp;{{ 7 * 7 }}"


def test_names_are_shown_as_text(ledger):
    enter(ledger, "a", folder=HOSTILE, steps=5)
    found = report(ledger)
    assert "script" not in found.tags and "b" not in found.tags
    assert "<script>alert(1)</script>??[2J'\"&amp;{{ 7 * 7 }}" in found.text


@pytest.mark.usefixtures("pictures")
def test_pictures_are_inside_and_nothing_is_loaded(ledger):
    enter(ledger, "a", steps=5)
    found = report(ledger)
    assert found.tags.count("svg") == 2
    assert all(link.startswith("#") for link in found.links)
    assert not {"script", "link", "img", "iframe", "object"} & {*found.tags}


def test_it_says_what_was_promised_and_what_was_not(ledger):
    ledger.set_budget(epsilon=4, delta=1e-5)
    ledger.set_budget(epsilon=8, delta=1e-5)
    enter(ledger, "a", steps=5)
    enter(ledger, "b", steps=5)
    ledger.note("b", state="withdrawn")
    text = report(ledger).text
    epsilon = round_up(account(((QUERY, 5),), delta=1e-5).epsilon, 2)
    assert "One run has used these data, or may have. It promises this:" in text
    assert f"(ε = {epsilon:g}, δ = 1e-05)-differential privacy" in text
    assert "The budget for these data is ε = 8 at δ = 1e-05. It is kept" in text and "It was set 2 times: ε = 4" in text
    assert "ended before its first step: it released nothing" in text
    assert "Runs outside the ledger." in text


def test_a_run_without_noise_is_called_what_it_is(ledger):
    enter(ledger, "a", steps=5)
    enter(ledger, "b", steps=5, query=NO_NOISE)
    text = report(ledger).text
    assert "No guarantee holds for all of these runs together. 1 of 2 runs added no noise." in text
    assert "None: no noise was added." in text
    assert "promises this" not in text and "Together they" not in text


def test_each_unit_has_a_part_of_its_own(ledger):
    enter(ledger, "a", steps=5)
    enter(ledger, "b", steps=5, unit_column="patient")
    text = report(ledger).text
    assert "runs that protect single rows" in text and "all rows of a user together (column patient)" in text


def test_an_empty_ledger_has_a_report_too(ledger):
    assert "No run has used these data." in report(ledger).text


def test_the_command_sets_shows_and_reports(path, tmp_path, capsys):
    assert main(["ledger", str(path), "--budget", "8", "--delta", "1e-5"]) == 0
    enter(DataLedger(path), "a", steps=5)
    capsys.readouterr()
    assert main(["ledger", str(path), "--report", str(tmp_path / "report.html")]) == 0
    printed = capsys.readouterr().out
    epsilon = round_up(account(((QUERY, 5),), delta=1e-5).epsilon)
    assert printed.splitlines()[-1].split() == ["written", str(tmp_path / "report.html")]
    assert f"{epsilon:g}" in printed and "8 at delta 1e-05: kept" in printed
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["ledger", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["units"][0]["epsilon"] == epsilon and said["budget"] == {"epsilon": 8.0, "delta": 1e-5}
    assert main(["ledger", str(path), "--budget", "0.001", "--delta", "1e-5"]) == 1
    assert "EXCEEDED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--budget", "8"], "add --delta"),
        (["--budget", "0", "--delta", "1e-5"], "an epsilon is above 0"),
        (["--delta", "2"], "there is no such ledger"),
        (["--report", "report.pdf"], "does not end in .html"),
        (["--report", "missing/report.html"], "there is no such folder"),
        ([], "there is no such ledger"),
        (["--add", "nowhere"], "there is no log of a run"),
        (["--budget", "nan", "--delta", "1e-5"], "an epsilon is above 0"),
        (["--budget", "8", "--delta", "2"], "delta lies between 0 and 1"),
    ],
)
def test_the_command_refuses_in_one_sentence_and_begins_no_ledger(path, capsys, flags, reason):
    assert reason in refused(capsys, "ledger", str(path), *flags)
    assert not path.exists()
