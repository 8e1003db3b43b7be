"""`hf-dpzo replay`: rebuild a model or an adapter from its base model and its log."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.cli.output import Outcome, Subparsers, format_table


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("replay", help="rebuild a model or an adapter from its base model and its log")
    parser.add_argument("base", help="what the run began from: a model on the Hub, a folder, or package://name")
    parser.add_argument("log", help="the folder of a run, or its trajectory.zo")
    parser.add_argument("--output", required=True, help="the folder to save to")
    parser.add_argument("--at-step", "--at_step", type=int, help="after so many steps; by default after all")
    parser.add_argument("--revision", help="branch, tag or commit of the base model on the Hub")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    from hf_dpzo.io.files import refuse_links_in
    from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
    from hf_dpzo.trajectory.replay import rebuild_model

    log = Trajectory.read(arguments.log)
    if (Path(arguments.output) / LOG_FILE).exists():
        raise ValueError(f"output={arguments.output}: it holds the log of a run, and maybe its weights; name another.")
    refuse_links_in(Path(arguments.output))
    model = rebuild_model(arguments.base, arguments.log, at_step=arguments.at_step, revision=arguments.revision)
    model.save_pretrained(arguments.output)
    steps = len(log.records) if arguments.at_step is None else arguments.at_step
    rows = [
        ("steps replayed", f"{steps} of {len(log.records)}, planned {log.header['plan']['steps']}"),
        ("bytes of a step", str(log.layout.record_size)),
        ("saved to", arguments.output),
    ]
    return Outcome(text=format_table(rows))
