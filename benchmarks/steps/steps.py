"""What a step costs in time and memory: ours, the bare forward passes, MeZO's scheme, DP-SGD and AdamW.

    pip install --no-deps -r benchmarks/steps/requirements.txt && pip install matplotlib
    python benchmarks/steps/steps.py run       # results.csv and machine.json, in half an hour; --quick: some minutes
    python benchmarks/steps/steps.py report    # the tables in ../README.md, and two pictures

Each contender is measured in a fresh process of its own, and they take turns: a round has every contender once, in an
order that changes. Ratios are taken within a round.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from drawing import pictures
from jobs import Plan, Turn, turns

from findings import Results, tables


HERE = Path(__file__).parent
TABLE, MACHINE, PAGE = HERE / "results.csv", HERE / "machine.json", HERE.parent / "README.md"
BEGIN, END = "<!-- steps: begin -->\n", "<!-- steps: end -->\n"
COLUMNS = (
    *("case", "round", "contender", "seconds", "peak", "preparing_peak", "libraries"),
    *("parameters", "trained_parameters", "error"),
)
LONGEST = 600  # Seconds a process may take.
PACKAGES = ("torch", "numpy", "numba", "transformers", "peft", "opacus")


def run(plan: Plan) -> None:
    """Measure all that the plan has, and write each result as it comes."""
    MACHINE.write_text(json.dumps(machine(plan), indent=2) + "\n", encoding="utf-8")
    with TABLE.open("w", newline="", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:
        plan = {**plan, "models": converted(plan, Path(folder))}
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for turn in turns(plan):
            started = time.monotonic()
            for (case, number, contender), found in zip(turn.rows, results_of(turn, plan["threads"]), strict=True):
                writer.writerow({"case": case, "round": number, "contender": contender, **_rounded(found)})
            file.flush()
            names = ", ".join(turn.contenders)
            sys.stdout.write(f"{turn.case}, round {turn.round}: {names} ({time.monotonic() - started:.0f} s)\n")
            sys.stdout.flush()


def results_of(turn: Turn, threads: int) -> list[dict[str, Any]]:
    """What a worker finds, for each of a turn's jobs; where it fails, the reason."""
    jobs = list(turn.jobs)
    command = [sys.executable, str(HERE / "worker.py"), json.dumps(jobs if len(jobs) > 1 else jobs[0])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, env=environment)
    except subprocess.TimeoutExpired:
        return [{"error": f"it takes more than {LONGEST} s"}] * len(jobs)
    if done.returncode < 0:
        return [{"error": "killed, for want of memory"}] * len(jobs)
    if done.returncode > 0:
        return [{"error": done.stderr.strip().splitlines()[-1]}] * len(jobs)
    found = json.loads(done.stdout.splitlines()[-1])
    return found if isinstance(found, list) else [found]


def converted(plan: Plan, folder: Path) -> dict[str, Any]:
    """The plan's models, in files that are quick to load: reading a GGUF file takes longer than to measure it."""
    from subjects import convert

    return {name: convert(spec, folder / name) for name, spec in plan["models"].items()}


def machine(plan: Plan) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": plan["threads"],
        "gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def report(plan: Plan) -> str:
    """Put the tables of what was measured into the page, draw it, and return them."""
    with TABLE.open(encoding="utf-8") as file:
        results = Results(plan, list(csv.DictReader(file)))
    text = tables(results, json.loads(MACHINE.read_text(encoding="utf-8")))
    pictures(results, HERE)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(rewritten(page, text), encoding="utf-8")
    return text


def rewritten(page: str, text: str) -> str:
    r"""The page with `text` between the two marks.

    >>> rewritten("Before.\n" + BEGIN + "old\n" + END, "new\n") == "Before.\n" + BEGIN + "new\n" + END
    True
    """
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{PAGE.name}: the marks {BEGIN.strip()} and {END.strip()} are missing; put them back.")
    return before + BEGIN + text + END + after


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--quick", action="store_true", help="the plan of quick.yaml")
    arguments = parser.parse_args()
    name = "quick.yaml" if arguments.quick else "steps.yaml"
    plan = yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
    if arguments.command == "run":
        run(plan)
    else:
        sys.stdout.write(report(plan))


if __name__ == "__main__":
    main()
