"""A private model as a log: a repository without weights, and the model that its log leads to."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_dpzo.card.declarations import Declarations
from hf_dpzo.card.files import READ_FILES, STATEMENT_FILE
from hf_dpzo.card.model_card import read_metadata, write_card
from hf_dpzo.card.schema import check_statement
from hf_dpzo.card.sources import MAX_TEXT_BYTES, Source, open_source
from hf_dpzo.card.upload import Destination, Snapshot, copy_log
from hf_dpzo.io.files import refuse_links
from hf_dpzo.io.strict_json import parse_json
from hf_dpzo.models.fingerprints import fingerprint_values
from hf_dpzo.models.history import mark_origin
from hf_dpzo.trajectory.base_files import MAX_DOWNLOAD, announce_download
from hf_dpzo.trajectory.earlier_runs import name_log
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import INITIAL_FILE, restore_initial_values
from hf_dpzo.trajectory.log import LOG_FILE, MAX_LOG_BYTES, Trajectory
from hf_dpzo.trajectory.parts import MAX_PARTS_BYTES, PARTS_FILE
from hf_dpzo.trajectory.replay import (
    build_initial_model,
    locate_base_model,
    replay_onto,
    replays_bitwise,
    select_trained_parameters,
)


# The largest file of initial values, in bytes. It is read tensor by tensor, and the model tells their shapes.
MAX_INITIAL_BYTES = 1 << 32


def from_trajectory(
    name: str | Path, *, base: str | None = None, revision: str | None = None, max_download: int = MAX_DOWNLOAD
) -> torch.nn.Module:
    """Return the model, or the base model with its adapter, that a published log leads to.

    Only the base model, the log, its initial values and `privacy.json` are downloaded. The weights are checked against
    the SHA-256 in `privacy.json`; `hf-dpzo verify` checks everything else.

    Args:
        name: a repository on the Hub, or a folder.
        base: the place of the base model. By default the log names it, if it is on the Hub or in a Python package.
        revision: a branch, tag or commit of the repository.
        max_download: the most bytes of a base model that are downloaded because the log names it. How many there are
            is logged before.

    Warns:
        UserWarning: the log does not replay bit for bit on this device, so the weights were not checked.

    Raises:
        SourceError: there is no such repository, or no log in it.
        StatementError: `privacy.json` cannot be read.
        TrajectoryError: the log is damaged, does not lead to the weights that were published, or names too large a
            base model.
    """
    source = open_source(name, revision)
    folder = fetch_log(source)
    log = Trajectory.read(folder)
    location, commit = (base, None) if base is not None else locate_base_model(log.header)
    if base is None:
        announce_download(location, commit, limit=max_download)
    statement = check_statement(source.read_json(STATEMENT_FILE))
    declared = statement["reproducibility"]["weights"]
    steps = len(log.records) if declared is None else declared["after_step"]
    model = build_initial_model(location, commit, log)
    restore_initial_values(model, folder)
    replay_onto(model, log, at_step=steps, anywhere=True)
    if not replays_bitwise(log, next(model.parameters()).device):
        warnings.warn(
            f"{name}: its log replays to the last bit on {log.header['replays_on']} alone; here the weights may differ "
            "by rounding, and were not checked.",
            stacklevel=2,
        )
    elif (
        declared is not None
        and fingerprint_values(select_trained_parameters(log, model).values()) != declared["sha256"]
    ):
        raise TrajectoryError(
            f"{name}: its log leads to other weights than its {STATEMENT_FILE} states; do not use it."
        )
    mark_origin(model, run=name_log(log), claim=statement["claim"])
    return model


def fetch_log(source: Source) -> Path:
    """Fetch the log, its initial values and its parts, and return the folder that holds them.

    Raises:
        SourceError: there is no log, or one of the files is too large.
    """
    limits = {LOG_FILE: MAX_LOG_BYTES}
    if INITIAL_FILE in source.sizes:
        limits[INITIAL_FILE] = MAX_INITIAL_BYTES
    if PARTS_FILE in source.sizes:
        limits[PARTS_FILE] = MAX_PARTS_BYTES
    return source.fetch(limits)


def push_log(folder: Path, destination: Destination) -> str:
    """Publish the log in `folder`, with its card and `privacy.json` but no weights; return the URL of the commit.

    Raises:
        LinkError: one of the files that are read is a link, and could lead to any file of this machine.
    """
    refuse_links(*(folder / name for name in READ_FILES))
    snapshot = Snapshot(folder)
    copy_log(folder, snapshot.folder)
    refresh_card(snapshot.folder, from_folder=folder, repository=destination.repository)
    return snapshot.upload(destination, message="A private model as its log", wait=True).commit_url


def read_statement(folder: Path) -> dict[str, Any] | None:
    """Return the statement in `folder`; `None` if there is none, or none that this version can read."""
    path = folder / STATEMENT_FILE
    try:
        if not path.is_file() or path.stat().st_size > MAX_TEXT_BYTES:
            return None
        return check_statement(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def refresh_card(
    folder: Path,
    *,
    from_folder: Path | None = None,
    repository: str | None = None,
    empirical: Mapping[str, Any] | None = None,
    without_results: bool = False,
) -> None:
    """Write the card, `privacy.json` and the picture again, from the log in `folder`.

    Args:
        folder: the folder of the log.
        from_folder: the folder whose card and `privacy.json` tell what the log cannot; by default `folder`. If its
            `privacy.json` cannot be read, nothing is declared.
        repository: the repository that the card names; by default the declared one.
        empirical: what an audit of the run found; by default what is declared of one.
        without_results: whether to leave the evaluation figures out, which no epsilon covers.

    Raises:
        LinkError: one of the files that are read is a link.
    """
    declared_in = from_folder or folder
    refuse_links(*(declared_in / name for name in READ_FILES))
    statement = read_statement(declared_in)  # There is none, or a kill cut it off.
    known = None if statement is None else replace(Declarations.from_statement(statement), names_software=True)
    declared = known or Declarations.from_log(Trajectory.read(folder))
    if repository is not None:
        declared = replace(declared, repository=repository)
    if empirical is not None:
        declared = replace(declared, empirical=empirical)
    if without_results:
        declared = replace(declared, metrics={}, metrics_step=None, history=())
    write_card(folder, declared, read_metadata(declared_in))
