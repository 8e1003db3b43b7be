"""Is it true what a published model says of its privacy? Without trust in any of its files.

What is shown: that claim and card are what the log says, that the base model is the one that was named, and that the
weights are those to which the log leads from there. What can not be shown from outside is that the log is of a run of
this library on the rows that were counted. But noise that is not there at all would show in the log.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from scipy import stats

from hf_dpzo._version import __version__
from hf_dpzo.card.declarations import Declarations
from hf_dpzo.card.files import CARD_FILE, CONFIG_FILES, PUBLIC_SUFFIXES, STATEMENT_FILE, is_weights_file
from hf_dpzo.card.front_matter import parse_card
from hf_dpzo.card.model_card import PRIVATE_TAG, render_card, summarize_claim
from hf_dpzo.card.repository import fetch_log
from hf_dpzo.card.schema import StatementError, check_statement
from hf_dpzo.card.sources import Source, SourceError, open_source
from hf_dpzo.card.statement import build_statement, describe_file
from hf_dpzo.io.strict_json import compare_json
from hf_dpzo.privacy.queries import LaplaceQuery
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import INITIAL_FILE
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
from hf_dpzo.trajectory.run import LoggedRun
from hf_dpzo.verification.finding import Finding
from hf_dpzo.verification.replay import check_replay


# Of honest logs, one in a million has so little noise.
CHANCE = 1e-6


# What the claim follows from and what it says; the rest of a statement describes the run.
CLAIM_FIELDS = ("status", "claim", "meaning", "accounting")


CHECKED_FILES = {CARD_FILE, STATEMENT_FILE, LOG_FILE, INITIAL_FILE, *CONFIG_FILES}


# Of a run's own folder, and of the Hub. Nothing is loaded from them.
HARMLESS_FILES = {"training_args.bin", ".gitattributes", ".gitignore", "LICENSE", f"{LOG_FILE}.lock"}


# How many of the values that noise alone makes lie that close to zero, and in how few of its scale.
CLOSE_SHARES = (0.05, 0.5)


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
    source = open_source(name, revision)
    return tuple(_findings(source, base, weights))


def _findings(source: Source, base: str | None, weights: bool) -> Iterator[Finding]:
    try:
        said = check_statement(source.read_json(STATEMENT_FILE))
    except (SourceError, StatementError) as error:
        said = None
        yield Finding(name=STATEMENT_FILE, holds=False, detail=str(error))
    try:
        folder = fetch_log(source)
        log = Trajectory.read(folder)
        run = LoggedRun.from_log(log)
    except (SourceError, TrajectoryError, ValueError) as error:
        yield Finding(name="log", holds=False, detail=str(error))
        return
    yield _check_log(log, folder, said)
    yield _noise(log, run)
    if said is not None:
        follows = json.loads(json.dumps(build_statement(folder, Declarations.from_statement(said))))
        yield from _compare_statement(said, follows)
        yield _check_card(follows, source)
    if weights:
        yield from check_replay(source, folder, log, said, base)
    yield _check_other_files(source)


def _check_log(log: Trajectory, folder: Path, statement: Mapping[str, Any] | None) -> Finding:
    steps, torn = len(log.records), " and a torn one, which counts as spent" if log.torn_bytes else ""
    if (
        statement is not None
        and statement["reproducibility"]["log"]["sha256"] != describe_file(folder / LOG_FILE)["sha256"]
    ):
        taken = steps if statement["claim"] is None else statement["claim"]["steps_taken"]
        detail = f"it holds {steps} steps{torn}, and {STATEMENT_FILE} says {taken}: steps were dropped or added"
        if taken == steps and not torn:
            detail = f"it is another one of {steps} steps than that whose SHA-256 {STATEMENT_FILE} has"
        return Finding(name="log", holds=False, detail=detail)
    return Finding(name="log", holds=True, detail=f"intact: a chain of {steps} steps{torn}")


def _noise(log: Trajectory, run: LoggedRun) -> Finding:
    """Whether what was released is as seldom near zero as noise alone is. Sums only move it away (Anderson 1955)."""
    if not run.budget.private:
        return Finding(name="noise", holds=True, detail="none, and none is claimed")
    released = [abs(integer) for record in log.records if not record.void for integer in record.integers]
    noise = stats.laplace if isinstance(run.budget.query, LaplaceQuery) else stats.norm
    for share in CLOSE_SHARES:
        within = run.method.mechanism.noise_scale * noise.ppf((1 + share) / 2)
        close = sum(value < within for value in released)
        if close > stats.binom.isf(CHANCE, len(released), share):
            detail = (
                f"{close} of {len(released)} released values are closer to zero than {share:.0%} of the noise that is "
                "claimed would be"
            )
            return Finding(name="noise", holds=False, detail=detail)
    return Finding(
        name="noise", holds=True, detail="what was released varies as the noise that is claimed does, or more"
    )


def _compare_statement(statement: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Finding]:
    """What the statement says, against what follows from the log and from what it declares."""
    parts = {
        "claim": [name for name in statement if name in CLAIM_FIELDS],
        "description": [name for name in statement if name not in CLAIM_FIELDS],
    }
    for part, names in parts.items():
        lines = [line for name in names for line in compare_json(statement[name], expected[name], name)]
        if lines:
            detail = f"{STATEMENT_FILE} (there) is not what the log says (here): {'; '.join(lines[:3])}"
            yield Finding(name=part, holds=False, detail=detail)
        elif part == "description":
            yield Finding(name=part, holds=True, detail=f"{STATEMENT_FILE} describes the run that the log is of")
        elif statement["claim"] is None:
            yield Finding(name=part, holds=True, detail="there is none: the model is NOT PRIVATE")
        else:
            stated = f"epsilon = {statement['claim']['epsilon']:g} at delta = {statement['claim']['delta']:g}"
            yield Finding(name=part, holds=True, detail=f"{stated}, computed again from the log")


def _check_card(expected: Mapping[str, Any], source: Source) -> Finding:
    """The card is what would be written anew."""
    try:
        card = parse_card(source.read_text(CARD_FILE))
        data = card.data.to_dict()
    except ValueError as error:
        return Finding(name="card", holds=False, detail=f"{error!s:.200}")
    wanted = render_card(expected, source.sizes)
    for number, (there, here) in enumerate(zip_longest(_lines(card), _lines(wanted), fillvalue=""), start=1):
        if there != here:
            return _build_edited_finding(expected, number, there, here)
    claimed = None if expected["claim"] is None else summarize_claim(expected)
    # PEFT takes the tag away when it saves a loaded adapter, which claims nothing.
    if data.get("differential_privacy") != claimed or (claimed is None and PRIVATE_TAG in data.get("tags", ())):
        return Finding(name="card", holds=False, detail="its metadata claim something else than its text")
    own = wanted.data.to_dict()
    if data.get("model-index") != own.get("model-index") or data.get("pipeline_tag") != own.get("pipeline_tag"):
        return Finding(
            name="card", holds=False, detail="its metadata have another task, or other results, than its text"
        )
    # PEFT names a base model also where it is in a folder.
    if data.get("base_model") not in (None, own.get("base_model"), expected["reproducibility"]["base_model"]["name"]):
        return Finding(name="card", holds=False, detail=f"its base_model is {data['base_model']!s:.100}")
    return Finding(name="card", holds=True, detail="it says what the log says; other metadata are its owner's")


def _build_edited_finding(follows: Mapping[str, Any], number: int, there: str, here: str) -> Finding:
    version = follows["versions"].get("hf_dpzo")
    detail = f"line {number} is {there!r:.100}, and the log asks for {here!r:.100}"
    if version != __version__:
        detail += f"; it was written by hf_dpzo {version}, and this is {__version__}: check it with that version"
    return Finding(name="card", holds=False, detail=detail)


def _lines(card: ModelCard) -> list[str]:
    """What PEFT adds when it saves an adapter again says nothing."""
    lines = card.text.strip().replace("\r\n", "\n").split("\n")
    return [line for line in lines if not re.fullmatch(r"- PEFT \d[\w.+]*", line)]


def _check_other_files(source: Source) -> Finding:
    """Files beside those that were looked at."""
    suspect = [name for name in source.sizes if not _is_known(name)]
    if suspect:
        detail = f"{', '.join(suspect[:3])}: what may run code, or hold other weights, was not opened"
        return Finding(name="other files", holds=False, detail=detail)
    rest = sorted(name for name in source.sizes if name not in CHECKED_FILES and not is_weights_file(name))
    detail = f"not looked at: {', '.join(rest)}" if rest else "none"
    return Finding(name="other files", holds=True, detail=detail)


def _is_known(name: str) -> bool:
    return Path(name).suffix in PUBLIC_SUFFIXES or name in HARMLESS_FILES
