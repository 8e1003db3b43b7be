"""The benchmark's plans can be run, its MeZO twin takes the steps of MeZO, and its figures mean what they say."""

import csv
import importlib
import json
import mmap
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from hf_dpzo.losses.prompting import NextWordLoss

from support.models import causal_lm
from support.paths import MEASUREMENTS


FOLDER = MEASUREMENTS / "steps"
PLANS = {name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) for name in ("steps", "quick")}
SMALL = {
    "baseline": "floor",
    "threads": 1,
    "models": {"tiny": {"config": {}, "loss": "prompt"}},
    "contenders": {"floor": {"kind": "floor"}, "ours": {"kind": "ours"}},
    "cases": [
        {"model": "tiny", "trained": "all", "batch": "2x8", "steps": 1, "contenders": {"floor": 2, "ours": 2}},
    ],
    "scaling": {"model": "tiny", "rounds": 1, "steps": 1, "axes": {"rows": {"values": [1, 2], "tokens": 4}}},
}
SMALL["scaling"]["axes"]["rows"]["trained"] = "all"


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules; none of them needs opacus before it is asked for DP-SGD."""
    sys.path.insert(0, str(FOLDER))
    names = ("contenders", "findings", "jobs", "meter", "mezo_twin", "steps", "subjects")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER))


def table(seconds: dict[tuple[int, str], float]) -> list[dict[str, str]]:
    """Return the rows of results.csv for `SMALL`, with these seconds in each round of each contender."""
    empty = {"peak": "300", "libraries": "100", "preparing_peak": "1", "parameters": "9", "trained_parameters": "9"}
    rows = [{"case": "tiny/all/2x8", "round": str(n), "contender": name, "seconds": str(value), "error": "", **empty}
            for (n, name), value in seconds.items()]  # fmt: skip
    for value in (1, 2):
        rows.append({**rows[0], "case": "scaling/rows", "round": "0", "contender": str(value), "seconds": str(value)})
    return rows


MEASURED = {(0, "floor"): 1.0, (0, "ours"): 1.1, (1, "floor"): 2.0, (1, "ours"): 2.6}


@torch.no_grad()
def test_the_twin_takes_the_textbook_step(recipe):
    model, inputs = causal_lm(), {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "labels": torch.tensor([0, 1])}
    loss = NextWordLoss(words=(11, 12), model=model)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    recipe.mezo_twin.random.seed(3)
    torch.manual_seed(recipe.mezo_twin.random.Random(3).randrange(1_000_000_000))
    z = torch.cat([torch.normal(0.0, 1.0, size=p.size()).view(-1) for p in model.parameters()])

    def at(vector: torch.Tensor) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(vector, model.parameters())
        return loss(model, inputs).mean()

    slope = (at(start + 1e-2 * z) - at(start - 1e-2 * z)) / 2e-2
    at(start.clone())
    recipe.mezo_twin.MezoTwin(model, learning_rate=0.1, eps=1e-2).step(loss, inputs)
    moved = torch.nn.utils.parameters_to_vector(model.parameters()) - start
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(moved, -0.1 * slope * z, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["floor", "ours", "mezo", "adamw"])
def test_a_contender_is_measured_for_the_requested_number_of_steps(recipe, kind):
    sizes = {"vocab_size": 64, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    spec = {"config": {**sizes, "num_attention_heads": 2, "dropout": 0.0}, "loss": "prompt"}
    subject = recipe.subjects.build(spec, trained="all", rows=3, tokens=6, loss="prompt")
    before = [parameter.clone() for parameter in subject.trained]
    meter = recipe.meter.Meter()
    recipe.contenders.KINDS[kind](subject, 2, meter)
    assert len(meter._laps) == 3
    result = meter.result()
    assert 0 < result["seconds"] < 60 and result["peak"] > 0
    moved = any(not torch.equal(one, two) for one, two in zip(before, subject.trained, strict=True))
    assert moved == (kind != "floor")


def test_a_peak_covers_the_steps_alone(recipe):
    meter = recipe.meter.Meter()
    with mmap.mmap(-1, 200 << 20) as held:  # A heap may keep what a tensor gives back. A mapping is gone.
        held.write(bytes(200 << 20))
    meter.start()
    meter.lap(), meter.lap()
    assert meter.result()["peak"] < meter.result()["preparing_peak"] - 150


def test_ratios_are_taken_within_a_round(recipe):
    ratio = recipe.findings.Results(SMALL, table(MEASURED)).ratio(SMALL["cases"][0], "ours", "seconds")
    # The rounds have 1.1 and 1.3. The ratio of the means, 3.7 / 3, would be 1.23.
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.2, 1.1, 1.3))
    assert str(ratio) == "1.20 (1.10 to 1.30)"


def test_memory_without_libraries_subtracts_those_of_each_process(recipe):
    rows = table(MEASURED)
    rows[1] |= {"peak": "500"}
    rows[3] |= {"peak": "500"}
    results = recipe.findings.Results(SMALL, rows)
    assert results.ratio(SMALL["cases"][0], "ours", "peak", above="libraries").median == pytest.approx(2.0)


def test_a_fitted_line_recovers_the_known_one(recipe):
    line = recipe.findings.Line.through([1, 2, 4, 8], [0.5 + 0.25 * x for x in (1, 2, 4, 8)])
    assert (line.at_zero, line.slope, line.r_squared) == pytest.approx((0.5, 0.25, 1.0))
    assert recipe.findings.Line.through([1, 2, 3, 4], [1, 3, 2, 4]).r_squared == pytest.approx(0.64)


def test_an_incomplete_table_is_refused_in_one_sentence(recipe):
    rows = [row for row in table(MEASURED) if (row["round"], row["contender"]) != ("1", "ours")]
    with pytest.raises(SystemExit, match=r"^results.csv: ours has no result in round 1 of tiny/all/2x8; .*\.$"):
        recipe.findings.Results(SMALL, rows)
    with pytest.raises(SystemExit, match="does not ask for"):
        recipe.findings.Results(SMALL, table({**MEASURED, (2, "ours"): 1.0}))


def test_a_contender_that_fails_is_reported_with_its_reason(recipe):
    rows = table(MEASURED)
    for row in rows[1:4:2]:
        row |= {"seconds": "", "peak": "", "error": "ValueError: tied"}
    machine = {"threads": 1, "cpu": "x", "cores": 2, "gib": 3, "date": "y", "versions": {"torch": "2", "opacus": None}}
    text = recipe.findings.tables(recipe.findings.Results(SMALL, rows), machine)
    assert "|  | ours | - | fails: ValueError: tied | - | - | - |" in text
    assert "torch 2." in text and "opacus" not in text


def test_the_page_keeps_the_text_around_the_tables(recipe):
    begin, end = recipe.steps.BEGIN, recipe.steps.END
    page = f"before\n{begin}old\n{end}after\n"
    assert recipe.steps.rewritten(page, "new\n") == f"before\n{begin}new\n{end}after\n"
    with pytest.raises(SystemExit, match="marks"):
        recipe.steps.rewritten("before\n", "new\n")


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_can_be_run(recipe, name, make_args):
    plan = PLANS[name]
    for case in plan["cases"]:
        assert recipe.jobs.baseline_of(plan, case) in case["contenders"]
        fewest = case["contenders"][recipe.jobs.baseline_of(plan, case)]
        assert all(rounds <= fewest for rounds in case["contenders"].values())
    planned = list(recipe.jobs.turns(plan))
    assert len({row for turn in planned for row in turn.rows}) == sum(len(turn.rows) for turn in planned)
    for job in (job for turn in planned for job in turn.jobs):
        assert job["kind"] in recipe.contenders.KINDS
        assert job["loss"] in recipe.subjects.LOSSES
        if job["kind"] == "ours":
            make_args(**job["options"])


def test_the_order_changes_with_the_round(recipe):
    case = {**PLANS["steps"]["cases"][0], "contenders": dict.fromkeys(("floor", "ours", "mezo"), 3)}
    planned = list(recipe.jobs.turns({**PLANS["steps"], "cases": [case]}))[:9]
    orders = [[turn.contenders[0] for turn in planned if turn.round == number] for number in range(3)]
    assert orders == [["floor", "ours", "mezo"], ["ours", "mezo", "floor"], ["mezo", "floor", "ours"]]


def test_the_recorded_table_matches_the_recorded_results(recipe):
    with recipe.steps.TABLE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    asked = {name: {row for turn in recipe.jobs.turns(plan) for row in turn.rows} for name, plan in PLANS.items()}
    keys = {(row["case"], int(row["round"]), row["contender"]) for row in rows}
    plan = next(plan for name, plan in PLANS.items() if asked[name] == keys)
    machine = json.loads(recipe.steps.MACHINE.read_text(encoding="utf-8"))
    text = recipe.findings.tables(recipe.findings.Results(plan, rows), machine)
    assert text in recipe.steps.PAGE.read_text(encoding="utf-8")
