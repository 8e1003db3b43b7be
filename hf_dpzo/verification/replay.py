"""Checks that a published model's weights are those that its log leads to from its base model."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_dpzo.card.files import CONFIG_FILES, STATEMENT_FILE
from hf_dpzo.card.sources import Source, SourceError
from hf_dpzo.models.fingerprints import fingerprint_frozen, fingerprint_values
from hf_dpzo.trajectory.base_files import announce_download
from hf_dpzo.trajectory.initial import INITIAL_FILE, restore_initial_values
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.replay import (
    build_initial_model,
    locate_base_model,
    replay_onto,
    replays_bitwise,
    select_trained_parameters,
)
from hf_dpzo.verification.configurations import compare_configurations
from hf_dpzo.verification.finding import Finding
from hf_dpzo.verification.published import holds_weights
from hf_dpzo.verification.weights import MAX_DRIFT, WeightDrift, compare_weights


# Returns the name and the model that a log began from.
OpenModel = Callable[[Trajectory], tuple[str, torch.nn.Module]]


def open_base_model(
    log: Trajectory, *, base: str | None, max_download: int, announce: Callable[[str], None]
) -> tuple[str, torch.nn.Module]:
    """Return the name of the base model, and the model that `log` began from.

    Args:
        log: the run's log.
        base: the base model's name or folder; `None` for the one that the log names.
        max_download: the most bytes that are downloaded because the log names them.
        announce: called with a sentence that says how much is downloaded.

    Raises:
        ValueError: the log names no base model that can be had, or too large a one.
        OSError: it cannot be loaded.
    """
    if base is not None:
        return base, build_initial_model(base, None, log)
    name, revision = locate_base_model(log.header)
    announce_download(name, revision, limit=max_download, announce=announce)
    return name, build_initial_model(name, revision, log)


def check_replay(
    source: Source, folder: Path, log: Trajectory, statement: Mapping[str, Any] | None, open_model: OpenModel
) -> Iterator[Finding]:
    """Replay the log onto the base model, and yield findings on the base model, the weights and the configuration.

    Args:
        source: the published files.
        folder: the folder that holds the log, and the initial values that belong to it.
        log: the run's log.
        statement: the content of `privacy.json`; `None` where it cannot be read.
        open_model: returns the base model.
    """
    try:
        name, model = open_model(log)
    except (OSError, ValueError) as error:
        yield Finding(name="base model", holds=None, detail=f"it is not to be had: {str(error).splitlines()[0]}")
        return
    try:
        restore_initial_values(model, folder)
        trained = select_trained_parameters(log, model)
    except (ValueError, OSError) as error:
        yield Finding(name="base model", holds=False, detail=str(error))
        return
    if fingerprint_frozen(model, trained.values()) != log.header["base"]["frozen"]:
        detail = f"{name} is not what the log began from: it was swapped, or changed"
        yield Finding(name="base model", holds=False, detail=detail)
        return
    if fingerprint_values(trained.values()) != log.header["trained"]["initial"]:
        detail = f"what is trained did not begin from the values in {name}: it was swapped, or changed"
        yield Finding(name="base model", holds=False, detail=detail)
        return
    supplement = f"; {INITIAL_FILE} gives what is new" if INITIAL_FILE in source.sizes else ""
    yield Finding(name="base model", holds=True, detail=f"{name} is what the log began from{supplement}")
    yield from _check_weights(source, model, log, statement)


def _check_weights(
    source: Source, model: torch.nn.Module, log: Trajectory, statement: Mapping[str, Any] | None
) -> Iterator[Finding]:
    declared = None if statement is None else statement["reproducibility"]["weights"]
    steps = len(log.records) if declared is None else declared["after_step"]
    if steps > len(log.records):
        detail = f"they are those after {steps} steps, and the log holds {len(log.records)}"
        yield Finding(name="weights", holds=False, detail=detail)
        return
    bitwise = replays_bitwise(log, next(model.parameters()).device)
    replay_onto(model, log, at_step=steps, anywhere=True)
    fingerprint = fingerprint_values(select_trained_parameters(log, model).values())
    if bitwise and declared is not None and declared["sha256"] != fingerprint:
        detail = f"those after {steps} steps of the log have another SHA-256 than {STATEMENT_FILE} says"
        yield Finding(name="weights", holds=False, detail=detail)
        return
    if not holds_weights(source):
        detail = f"there are none; {steps} steps of the log lead to those whose SHA-256 is stated"
        if declared is None:
            detail = "there are none, and no SHA-256 of any is stated: there is nothing to compare"
        elif not bitwise:
            detail = f"there are none, and the log replays to the last bit on {log.header['replays_on']} alone"
        yield Finding(name="weights", holds=True if declared is not None and bitwise else None, detail=detail)
        if not any(name in source.sizes for name in CONFIG_FILES):
            return
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        try:
            if holds_weights(source):
                yield _build_weights_finding(compare_weights(source, Path(scratch)), log, steps, bitwise=bitwise)
        except SourceError as error:
            yield Finding(name="weights", holds=False, detail=str(error))
        try:
            base = log.header["base"]
            lines = compare_configurations(source, Path(scratch), model, base=base["name"], revision=base["revision"])
            yield _build_configuration_finding(lines)
        except SourceError as error:
            yield Finding(name="configuration", holds=False, detail=str(error))


def _build_weights_finding(drift: WeightDrift | None, log: Trajectory, steps: int, *, bitwise: bool) -> Finding:
    if drift is None:
        return Finding(name="weights", holds=True, detail=f"bit for bit those that {steps} steps of the log lead to")
    if bitwise or drift.relative_drift > MAX_DRIFT:
        detail = f"{drift.tensor}: {drift.detail}"
        return Finding(name="weights", holds=False, detail=detail)
    detail = (
        f"those that {steps} steps of the log lead to, up to {drift.relative_drift:.2g} of a tensor's largest entry: "
        f"this run replays to the last bit on {log.header['replays_on']} alone"
    )
    return Finding(name="weights", holds=True, detail=detail)


def _build_configuration_finding(lines: list[str]) -> Finding:
    if lines:
        detail = f"it (there) is not what the log leads to (here): {'; '.join(lines[:3])}"
        return Finding(name="configuration", holds=False, detail=detail)
    return Finding(name="configuration", holds=True, detail="that of the base model and of the log")
