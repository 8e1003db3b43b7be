"""Is it true what a published model says of its privacy? Without trust in any of its files.

What is shown: that claim and card are what the log says, that the base model is the one that was named, and that the
weights are those to which the log leads from there. What can not be shown from outside is that the log is of a run of
this library on the rows that were counted. But noise that is not there at all would show in the log.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from scipy import stats

from hf_dpzo._version import __version__
from hf_dpzo.declared import Declared
from hf_dpzo.finding import Finding
from hf_dpzo.log_repository import fetched_log
from hf_dpzo.model_card import CARD_FILE, PRIVATE_TAG, STATEMENT_FILE, in_short, rendered
from hf_dpzo.planned import PlannedRun
from hf_dpzo.queries import LaplaceQuery
from hf_dpzo.replayed import replayed_findings
from hf_dpzo.schema import StatementError, check_statement
from hf_dpzo.sources import Source, SourceError, source_of
from hf_dpzo.statement import privacy_statement
from hf_dpzo.trajectory import LOG_FILE, Trajectory, TrajectoryError, differences


# Of honest logs, one in a million has so little noise.
CHANCE = 1e-6
# What the claim follows from and what it says; the rest of a statement describes the run.
CLAIMED = ("status", "claim", "meaning", "accounting")
# Files from which a model could be loaded in place of what was verified, and which are never opened.
UNOPENED = {".bin", ".ckpt", ".h5", ".msgpack", ".pickle", ".pkl", ".pt", ".pth", ".py"}
HARMLESS = {"training_args.bin"}


def verify(
    name: str | Path, *, base: str | None = None, revision: str | None = None, weights: bool = True
) -> tuple[Finding, ...]:
    """Check everything that a published model says of its privacy.

    Args:
        name: a folder, or a repository on the Hub, of which one commit is looked at.
        base: where the base model is; by default where the log says, if that is on the Hub or in a Python package.
        revision: branch, tag or commit of the repository.
        weights: whether to load the base model, and replay the weights.

    Raises:
        SourceError: there is nothing to verify.
    """
    source = source_of(name, revision)
    return tuple(_findings(source, base, weights))


def _findings(source: Source, base: str | None, weights: bool) -> Iterator[Finding]:
    try:
        said = check_statement(source.json(STATEMENT_FILE))
    except (SourceError, StatementError) as error:
        said = None
        yield Finding(name=STATEMENT_FILE, holds=False, detail=str(error))
    try:
        folder = fetched_log(source)
        log = Trajectory.read(folder)
        run = PlannedRun.of(log)
    except (SourceError, TrajectoryError, ValueError) as error:
        yield Finding(name="log", holds=False, detail=str(error))
        return
    yield _of_log(log, folder, said)
    yield _noise(log, run)
    if said is not None:
        yield from _of_statement(said, folder)
        yield _of_card(said, source)
    if weights:
        yield from replayed_findings(source, folder, log, said, base)
    yield from _unopened(source)


def _of_log(log: Trajectory, folder: Path, said: Mapping[str, Any] | None) -> Finding:
    steps, torn = len(log.records), " and a torn one, which counts as spent" if log.torn else ""
    if said is not None and said["reproducibility"]["log"]["sha256"] != _sha256(folder / LOG_FILE):
        taken = steps if said["claim"] is None else said["claim"]["steps_taken"]
        detail = f"it holds {steps} steps{torn}, and {STATEMENT_FILE} says {taken}: steps were dropped or added"
        if taken == steps and not torn:
            detail = f"it is another one of {steps} steps than that whose SHA-256 {STATEMENT_FILE} has"
        return Finding(name="log", holds=False, detail=detail)
    return Finding(name="log", holds=True, detail=f"intact: a chain of {steps} steps{torn}")


def _noise(log: Trajectory, run: PlannedRun) -> Finding:
    """Whether what was released varies as much as the noise alone would. Sums only make it vary more."""
    if not run.budget.private:
        return Finding(name="noise", holds=True, detail="none, and none is claimed")
    released = [integer for record in log.records if not record.void for integer in record.integers]
    scale = run.method.mechanism.noise_scale
    if isinstance(run.budget.query, LaplaceQuery):
        spread, least = sum(map(abs, released)) / scale, stats.gamma.ppf(CHANCE, len(released))
    else:
        spread, least = sum((value / scale) ** 2 for value in released), stats.chi2.ppf(CHANCE, len(released))
    if released and spread < least:
        ratio = spread / len(released)
        detail = f"what was released varies {ratio:.2g} times as much as the noise that is claimed would alone"
        return Finding(name="noise", holds=False, detail=detail)
    return Finding(name="noise", holds=True, detail="what was released varies at least as much as the noise should")


def _of_statement(said: Mapping[str, Any], folder: Path) -> Iterator[Finding]:
    """What the statement says, against what the log says."""
    recomputed = json.loads(json.dumps(privacy_statement(folder, Declared.of_statement(said))))
    parts = {
        "claim": [name for name in said if name in CLAIMED],
        "description": [name for name in said if name not in CLAIMED],
    }
    for part, names in parts.items():
        lines = [line for name in names for line in differences(said[name], recomputed[name], name)]
        if lines:
            detail = f"{STATEMENT_FILE} (there) is not what the log says (here): {'; '.join(lines[:3])}"
            yield Finding(name=part, holds=False, detail=detail)
        elif part == "description":
            yield Finding(name=part, holds=True, detail=f"{STATEMENT_FILE} describes the run that the log is of")
        elif said["claim"] is None:
            yield Finding(name=part, holds=True, detail="there is none: the model is NOT PRIVATE")
        else:
            stated = f"epsilon = {said['claim']['epsilon']:g} at delta = {said['claim']['delta']:g}"
            yield Finding(name=part, holds=True, detail=f"{stated}, computed again from the log")


def _of_card(said: Mapping[str, Any], source: Source) -> Finding:
    """The card is what would be written anew."""
    try:
        card = ModelCard(source.text(CARD_FILE))
    except (SourceError, ValueError) as error:
        return Finding(name="card", holds=False, detail=str(error))
    wanted = rendered(said, source.sizes)
    for number, (there, here) in enumerate(zip_longest(_lines(card), _lines(wanted), fillvalue=""), start=1):
        if there != here:
            return _edited_card(said, number, there, here)
    claimed = None if said["claim"] is None else in_short(said)
    data = card.data.to_dict()
    # PEFT takes the tag away when it saves a loaded adapter, which claims nothing.
    if data.get("differential_privacy") != claimed or (claimed is None and PRIVATE_TAG in data.get("tags", ())):
        return Finding(name="card", holds=False, detail="its metadata claim something else than its text")
    if data.get("model-index") != wanted.data.to_dict().get("model-index"):
        return Finding(name="card", holds=False, detail=f"its model-index has other results than {STATEMENT_FILE}")
    return Finding(name="card", holds=True, detail=f"it says what {STATEMENT_FILE} says")


def _edited_card(said: Mapping[str, Any], number: int, there: str, here: str) -> Finding:
    version = said["versions"].get("hf_dpzo")
    detail = f"line {number} is {there!r:.100}, and {STATEMENT_FILE} asks for {here!r:.100}"
    if version != __version__:
        other = f"; but it was written by hf_dpzo {version}, and this is {__version__}: check it with that version"
        return Finding(name="card", holds=None, detail=f"{detail}{other}")
    return Finding(name="card", holds=False, detail=detail)


def _lines(card: ModelCard) -> list[str]:
    """What PEFT adds when it saves an adapter again says nothing."""
    return [line for line in card.text.strip().splitlines() if not line.startswith("- PEFT ")]


def _unopened(source: Source) -> Iterator[Finding]:
    names = [name for name in source.sizes if Path(name).suffix in UNOPENED and name not in HARMLESS]
    if names:
        detail = f"{', '.join(names[:3])}: files that can run code, or hold other weights, were not opened"
        yield Finding(name="other files", holds=False, detail=detail)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
