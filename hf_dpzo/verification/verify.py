"""Verifies what a published model says of its privacy, without trust in any of its files.

The checks show that claim and card follow from the log, that the base model is the one that was named, and that the log
leads from there to the weights. They cannot show, from outside, that this library ran on the rows that were counted
and wrote the log. But noise that is missing altogether would show in the log.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from scipy import stats

from hf_dpzo._version import __version__
from hf_dpzo.card.declarations import Declarations
from hf_dpzo.card.files import CARD_FILE, STATEMENT_FILE
from hf_dpzo.card.front_matter import CardError, list_tags, parse_card
from hf_dpzo.card.model_card import PRIVATE_TAG, render_card, summarize_claim
from hf_dpzo.card.repository import fetch_log
from hf_dpzo.card.schema import StatementError, check_statement
from hf_dpzo.card.sources import Source, SourceError, open_source
from hf_dpzo.card.statement import build_statement, describe_file
from hf_dpzo.io.foreign import describe_error, one_sentence
from hf_dpzo.io.strict_json import compare_json
from hf_dpzo.privacy.queries import LaplaceQuery
from hf_dpzo.trajectory.base_files import MAX_DOWNLOAD, logger
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
from hf_dpzo.trajectory.run import LoggedRun
from hf_dpzo.verification.finding import Finding
from hf_dpzo.verification.other_files import check_other_files
from hf_dpzo.verification.recipe import check_recipe
from hf_dpzo.verification.replay import OpenModel, check_replay, open_base_model


# The probability, at most, that an honest log fails the check of its noise, for each of the shares below.
CHANCE = 1e-6


# The fields that state the claim and what it follows from. The rest of a statement describes the run.
CLAIM_FIELDS = ("status", "claim", "meaning", "accounting")


# The check of noise counts the released values that lie as close to zero as these shares of pure noise do.
CLOSE_SHARES = (0.05, 0.5)


def verify(
    name: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    weights: bool = True,
    max_download: int = MAX_DOWNLOAD,
    announce: Callable[[str], None] = logger.warning,
) -> tuple[Finding, ...]:
    """Check everything that a published model says of its privacy.

    Args:
        name: a folder, or a repository on the Hub, of which one commit is checked.
        base: the base model's name or folder; by default the one that the log names, if that is on the Hub or in a
            Python package.
        revision: the repository's branch, tag or commit.
        weights: whether to load the base model and replay the weights.
        max_download: the most bytes of a base model that are downloaded because the log names it.
        announce: called with a sentence that says how much is downloaded, before it is.

    Returns:
        the findings, in the order in which the files depend on each other.

    Raises:
        SourceError: there is nothing to verify.
    """
    source = open_source(name, revision)
    open_model = partial(open_base_model, base=base, max_download=max_download, announce=announce)
    return tuple(_run_checks(source, open_model if weights else None))


def _run_checks(source: Source, open_model: OpenModel | None) -> Iterator[Finding]:
    statement = None
    try:
        with one_sentence(f"{STATEMENT_FILE}: it cannot be read", StatementError, SourceError, remedy="write it anew"):
            statement = check_statement(source.read_json(STATEMENT_FILE))
    except (StatementError, SourceError) as error:
        yield Finding(name=STATEMENT_FILE, holds=False, detail=str(error))
    try:
        remedy = "use a copy of the log that nobody changed"
        with one_sentence(f"{LOG_FILE}: it cannot be read", TrajectoryError, SourceError, remedy=remedy):
            folder = fetch_log(source)
            log = Trajectory.read(folder)
            run = LoggedRun.from_log(log)
    except (TrajectoryError, SourceError) as error:
        yield Finding(name="log", holds=False, detail=str(error))
        return
    yield from _guard("log", lambda: [_check_log(log, folder, statement)])
    yield from _guard("noise", lambda: [_check_noise(log, run)])
    if statement is not None:
        yield from _guard("claim", lambda: _check_statement(statement, folder, source))
    if open_model is not None:
        yield from _guard("weights", lambda: check_replay(source, folder, log, statement, open_model))
    yield from _guard("other files", lambda: [check_other_files(source, folder / LOG_FILE)])


def _guard(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of `check`. If it ends in an error, the last one says so: a stranger wrote what it read."""
    try:
        yield from check()
    except Exception as error:
        detail = str(error) if isinstance(error, SourceError) else f"it cannot be checked ({describe_error(error)})"
        yield Finding(name=name, holds=False, detail=detail)


def _check_statement(statement: Mapping[str, Any], folder: Path, source: Source) -> Iterator[Finding]:
    """Compare the statement and the card with what the log in `folder` leads to."""
    expected = json.loads(json.dumps(build_statement(folder, Declarations.from_statement(statement))))
    yield from _compare_statement(statement, expected)
    yield from _guard("card", lambda: [_check_card(expected, source)])
    if "recipe" in expected["training"]:
        yield from _guard("recipe", lambda: [check_recipe(source, expected)])


def _check_log(log: Trajectory, folder: Path, statement: Mapping[str, Any] | None) -> Finding:
    steps = len(log.records)
    torn = " and a torn one, which counts as spent" if log.torn_bytes else ""
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


def _check_noise(log: Trajectory, run: LoggedRun) -> Finding:
    """Check that released values lie near zero no more often than noise alone would.

    The sums that noise is added to only move them away from zero (Anderson 1955).
    """
    if not run.budget.private:
        return Finding(name="noise", holds=True, detail="none, and none is claimed")
    released = [abs(integer) for record in log.records if not record.void for integer in record.integers]
    distribution = stats.laplace if isinstance(run.budget.query, LaplaceQuery) else stats.norm
    for share in CLOSE_SHARES:
        bound = run.method.mechanism.noise_scale * distribution.ppf((1 + share) / 2)
        close = sum(value < bound for value in released)
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
    """Compare the statement with what follows from the log and from the statement's own declarations."""
    fields = sorted({*statement, *expected})
    parts = {
        "claim": [name for name in fields if name in CLAIM_FIELDS],
        "description": [name for name in fields if name not in CLAIM_FIELDS],
    }
    for part, names in parts.items():
        lines = [line for name in names for line in compare_json(statement.get(name), expected.get(name), name)]
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
    """Check that the card is the one that would be written from scratch."""
    try:
        card = parse_card(source.read_text(CARD_FILE))
        data = card.data.to_dict()
    except (CardError, SourceError) as error:
        return Finding(name="card", holds=False, detail=f"{error!s:.200}")
    wanted_card = render_card(expected, source.sizes)
    lines = zip_longest(_split_lines(card), _split_lines(wanted_card), fillvalue="")
    for number, (published, wanted) in enumerate(lines, start=1):
        if published != wanted:
            return _build_edited_finding(expected, number, published, wanted)
    claimed = None if expected["claim"] is None else summarize_claim(expected)
    # PEFT drops the tag when it saves a loaded adapter. A card without the tag claims nothing by it.
    if data.get("differential_privacy") != claimed or (claimed is None and PRIVATE_TAG in list_tags(data)):
        return Finding(name="card", holds=False, detail="its metadata claim something else than its text")
    wanted_data = wanted_card.data.to_dict()
    if any(data.get(key) != wanted_data.get(key) for key in ("model-index", "pipeline_tag")):
        return Finding(
            name="card", holds=False, detail="its metadata have another task, or other results, than its text"
        )
    # PEFT names the base model even if it was loaded from a folder.
    if data.get("base_model") not in (
        None,
        wanted_data.get("base_model"),
        expected["reproducibility"]["base_model"]["name"],
    ):
        return Finding(name="card", holds=False, detail=f"its base_model is {data['base_model']!s:.100}")
    return Finding(name="card", holds=True, detail="it says what the log says; other metadata are its owner's")


def _build_edited_finding(expected: Mapping[str, Any], number: int, published: str, wanted: str) -> Finding:
    version = expected["versions"].get("hf_dpzo")
    detail = f"line {number} is {published!r:.100}, and the log asks for {wanted!r:.100}"
    if version != __version__:
        detail += f"; it was written by hf_dpzo {version}, and this is {__version__}: check it with that version"
    return Finding(name="card", holds=False, detail=detail)


def _split_lines(card: ModelCard) -> list[str]:
    """Split the card's text into lines, without the version that PEFT adds when it saves an adapter again."""
    lines = card.text.strip().replace("\r\n", "\n").split("\n")
    return [line for line in lines if not re.fullmatch(r"- PEFT \d[\w.+]*", line)]
