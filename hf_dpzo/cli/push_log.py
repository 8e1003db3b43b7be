"""`hf-dpzo push-log`: publish a private model as its log."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_dpzo.cli.output import Outcome, Subparsers, format_table


def add_command(commands: Subparsers) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser("push-log", help="publish a private model as its log, without weights")
    parser.add_argument("folder", help="the folder of a run, or of a model that it saved")
    parser.add_argument("repository", help="user/model on the Hub; it is made if it is not there")
    parser.add_argument("--revision", help="the branch to commit to")
    parser.add_argument("--private", action="store_true", help="if it is made, make it private")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, _: Sequence[str]) -> Outcome:
    from huggingface_hub import HfApi

    from hf_dpzo.card.files import READ_FILES, STATEMENT_FILE
    from hf_dpzo.card.repository import push_log
    from hf_dpzo.card.upload import Destination
    from hf_dpzo.io.files import refuse_links
    from hf_dpzo.models.hub import HUB_ERRORS, explain_hub_error
    from hf_dpzo.trajectory.log import LOG_FILE

    folder = Path(arguments.folder)
    for name, remedy in (
        (LOG_FILE, "name the output_dir of a run"),
        (STATEMENT_FILE, f"run hf-dpzo card {folder} first"),
    ):
        if not (folder / name).is_file():
            raise ValueError(f"folder={folder}: it holds no {name}; {remedy}.")
    refuse_links(*(folder / name for name in READ_FILES))
    try:
        created = HfApi().create_repo(arguments.repository, private=arguments.private or None, exist_ok=True)
        url = push_log(folder, Destination(repository=created.repo_id, revision=arguments.revision))
    except HUB_ERRORS as error:
        fault = explain_hub_error(error)
        raise ValueError(f"repository={arguments.repository}: {fault}.") from None
    return Outcome(
        text=format_table([("published", url), ("bytes of the log", str((folder / LOG_FILE).stat().st_size))])
    )
