"""A private model as a log: a repository that holds no weights, and the model that comes of it."""

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from hf_dpzo.card.declarations import Declarations
from hf_dpzo.card.files import STATEMENT_FILE
from hf_dpzo.card.model_card import read_metadata, write_card
from hf_dpzo.card.schema import StatementError, check_statement
from hf_dpzo.card.sources import Source, SourceError, open_source
from hf_dpzo.card.upload import Destination, Snapshot, copy_log
from hf_dpzo.models.fingerprints import fingerprint_values
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import INITIAL_FILE, restore_initial_values
from hf_dpzo.trajectory.log import LOG_FILE, MAX_LOG_BYTES, Trajectory
from hf_dpzo.trajectory.replay import (
    build_initial_model,
    locate_base_model,
    replay_onto,
    replays_bitwise,
    select_trained_parameters,
)


# In bytes on disk. It is opened tensor by tensor, once a model tells their shapes.
MAX_INITIAL_BYTES = 1 << 32


def from_trajectory(name: str | Path, *, base: str | None = None, revision: str | None = None) -> torch.nn.Module:
    """Return the model, or the base model with its adapter, that a published log leads to.

    Nothing but the base model, the log, its initial values and `privacy.json` is downloaded. The weights are checked
    against the SHA-256 in `privacy.json`; `hf-dpzo verify` checks all the rest.

    Args:
        name: a repository on the Hub, or a folder.
        base: where the base model is; by default where the log says, if that is on the Hub or in a Python package.
        revision: branch, tag or commit of the repository.

    Raises:
        SourceError: there is no such repository, or no log in it.
        TrajectoryError: the log is damaged, or does not lead to the weights that were published.
    """
    source = open_source(name, revision)
    folder = fetch_log(source)
    log = Trajectory.read(folder)
    where, commit = (base, None) if base is not None else locate_base_model(log.header)
    declared = check_statement(source.read_json(STATEMENT_FILE))["reproducibility"]["weights"]
    steps = len(log.records) if declared is None else declared["after_step"]
    model = build_initial_model(where, commit, log)
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
    return model


def fetch_log(source: Source) -> Path:
    """Return a folder with the log, and the initial values that belong to it."""
    limits = {LOG_FILE: MAX_LOG_BYTES}
    if INITIAL_FILE in source.sizes:
        limits[INITIAL_FILE] = MAX_INITIAL_BYTES
    return source.fetch(limits)


def push_log(folder: Path, destination: Destination) -> str:
    """Publish the log in `folder`, with its card and `privacy.json`, and no weights; return the commit's address."""
    snapshot = Snapshot(folder)
    copy_log(folder, snapshot.folder)
    refresh_card(snapshot.folder, from_folder=folder, repository=destination.repository)
    return snapshot.upload(destination, message="A private model as its log", wait=True).commit_url


def refresh_card(folder: Path, *, from_folder: Path | None = None, repository: str | None = None) -> None:
    """Write card, `privacy.json` and picture anew from the log in `folder`.

    What a log can not tell is taken from the `privacy.json` in `from_folder`, by default in `folder`; where there is
    none that can be read, nothing is declared.
    """
    there = from_folder or folder
    try:
        declared = Declarations.from_statement(check_statement(open_source(there).read_json(STATEMENT_FILE)))
    except (SourceError, StatementError):  # There is none, or one that a kill cut off.
        declared = Declarations.from_log(Trajectory.read(folder))
    if repository is not None:
        declared = replace(declared, repository=repository)
    write_card(folder, declared, read_metadata(there))
