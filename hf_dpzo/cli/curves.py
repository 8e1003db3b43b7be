"""The flags with which `hf-dpzo epsilon` and `hf-dpzo calibrate` draw what a plan costs as a curve."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.plots import check_output_path, check_picture_path, draw_curve
from hf_dpzo.privacy.planning import (
    DEFAULT_CALIBRATED_POINTS,
    DEFAULT_POINTS,
    MAX_POINTS,
    Curve,
    Plan,
    choose_values,
    compute_curve,
)


def add_curve_flags(parser: argparse.ArgumentParser, *, against: Sequence[str], shown: str) -> None:
    """Add the flags to `parser`: `shown` against one of the flags `against`."""
    flags = parser.add_argument_group("the trade-off", f"{shown} against another flag, as a picture or as a table")
    flags.add_argument("--against", choices=against, help="the flag that changes; the others stay as they are")
    flags.add_argument("--picture", help="draw the curve into this file: .png, .svg or .pdf")
    flags.add_argument("--csv", help="write its points into this file, one a line, with bounds rounded up")
    bounds = {"type": float, "metavar": "VALUE"}
    flags.add_argument(
        "--from", dest="low", **bounds, help="the lowest; by default a tenth of the plan's own, or a quarter of noise"
    )
    flags.add_argument("--to", dest="high", **bounds, help="the highest; by default ten times the plan's own, or four")
    points = DEFAULT_CALIBRATED_POINTS if "target_epsilon" in against else DEFAULT_POINTS
    flags.add_argument("--points", type=int, help=f"how many, up to {MAX_POINTS}; by default {points}")


def write_curve(arguments: argparse.Namespace, plan: Plan) -> list[tuple[str, str]]:
    """Write what the flags ask for about `plan`, and return lines that say so. Flags are checked before any work."""
    if arguments.against is None:
        _refuse_lone_flags(arguments)
        return []
    if arguments.picture is None and arguments.csv is None:
        raise ValueError(f"against={arguments.against}: there is nowhere to put the curve; add --picture or --csv.")
    if arguments.picture is not None:
        check_picture_path(Path(arguments.picture))
    if arguments.csv is not None:
        _check_csv(Path(arguments.csv))
    values = choose_values(plan, arguments.against, low=arguments.low, high=arguments.high, points=arguments.points)
    found = compute_curve(plan, arguments.against, values)
    if arguments.csv is not None:
        _write_csv(found, Path(arguments.csv))
    if arguments.picture is not None:
        draw_curve(found, Path(arguments.picture))
    return _describe_curve(found)


def _check_csv(path: Path) -> None:
    if path.suffix != ".csv":
        raise ValueError(f"csv={path}: it does not end in .csv; name a file that does.")
    check_output_path(path, flag="csv")


def _refuse_lone_flags(arguments: argparse.Namespace) -> None:
    flags = {"picture": arguments.picture, "csv": arguments.csv, "from": arguments.low, "to": arguments.high}
    for flag, value in {**flags, "points": arguments.points}.items():
        if value is not None:
            raise ValueError(f"{flag}={value}: it is for a curve; say with --against which flag is to change.")


def _describe_curve(found: Curve) -> list[tuple[str, str]]:
    first, last = (f"{found.value_at(point):g}" for point in (found.points[0], found.points[-1]))
    left_out = f"; {found.num_left_out} left out, for which no epsilon can be stated" if found.num_left_out else ""
    return [("curve", f"{len(found.points)} points, {found.against} from {first} to {last}{left_out}")]


def _write_csv(found: Curve, path: Path) -> None:
    lines = [point.as_row() for point in found.points]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
