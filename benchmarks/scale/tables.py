"""The tables of docs/scale.md.

    python benchmarks/scale/tables.py

prints what the model of cost.py says of the machines and the runs of scale.yaml.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cost
import yaml


PLAN = Path(__file__).with_name("scale.yaml")


def words(seconds: float) -> str:
    """Seconds, to two digits, in a unit that reads well.

    >>> words(0.0000123), words(0.25), words(83.4), words(7200), words(0)
    ('12 µs', '250 ms', '83 s', '2 h', '0')
    """
    if seconds == 0:
        return "0"
    units = (("h", 3600.0, 7200.0), ("min", 60.0, 120.0), ("s", 1.0, 1.0), ("ms", 1e-3, 1e-3), ("µs", 1e-6, 0.0))
    unit, size = next((unit, size) for unit, size, least in units if seconds >= least)
    return f"{float(f'{seconds / size:.2g}'):.10g} {unit}"


def row(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |\n"


def planned(plan: Mapping[str, Any], scenario: Mapping[str, Any], directions: int) -> tuple[cost.Run, cost.Machine]:
    """A run of a scenario, and what it runs on."""
    run = cost.Run(**plan["run"] | scenario["run"], directions=directions)
    return run, cost.Machine(**plan["machine"] | scenario["machine"])


def steps(plan: Mapping[str, Any]) -> Iterator[str]:
    """The table of a step and its terms, on the first network."""
    network = cost.Network(**next(iter(plan["networks"].values())))
    head = ("trained; a copy of the model", "K", "forward passes", "shared evenly", "weights gathered", "sweeps")
    yield row(*head, "signs", "a step", "passes of DP-SGD")
    yield row(*["---"] * 9)
    for scenario in plan["scenarios"]:
        for directions in plan["directions"]:
            run, machine = planned(plan, scenario, directions)
            cost.refuse_unfit(run, machine)
            terms = (
                cost.forward_seconds(run, machine),
                cost.even_seconds(run, machine),
                cost.gathering_seconds(run, machine, network),
                cost.sweep_seconds(run, machine),
                cost.sign_seconds(run, machine),
                cost.step_seconds(run, machine, network),
                cost.backward_seconds(run, machine),
            )
            yield row(f"{scenario['trained']}; {scenario['copy']}", directions, *map(words, terms))


def traffic(plan: Mapping[str, Any]) -> Iterator[str]:
    """The table of what each network makes of what crosses it, for the first scenario and the last."""
    few, many = min(plan["directions"]), max(plan["directions"])
    ends = (plan["scenarios"][0], plan["scenarios"][-1])
    gradients = [f"gradients: {scenario['trained']}" for scenario in ends]
    yield row("between hosts", f"ours: K = {few}", f"ours: K = {many}", *gradients, "weights of a pass")
    yield row(*["---"] * 6)
    for name, options in plan["networks"].items():
        network = cost.Network(**options)
        cells = [cost.collective_seconds(*planned(plan, ends[0], k), network) for k in (few, many)]
        cells += [cost.gradient_seconds(*planned(plan, scenario, few), network) for scenario in ends]
        yield row(name, *map(words, [*cells, cost.gathered_seconds(*planned(plan, ends[-1], few), network)]))


def main() -> None:
    """Print both tables."""
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    sys.stdout.writelines([*steps(plan), "\n", *traffic(plan)])


if __name__ == "__main__":
    main()
