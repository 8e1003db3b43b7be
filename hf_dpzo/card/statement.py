"""The guarantee as data: what `privacy.json` says.

Every number about privacy follows from the log beside it, so a reader who has the log can compute it again. What a log
cannot tell is in `Declarations`, and is not checked. Nothing here takes an epsilon.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dpzo.card.claim import build_claim, build_meaning, list_conditions
from hf_dpzo.card.declarations import SOFTWARE, Declarations
from hf_dpzo.isolation.bound import worst_isolation
from hf_dpzo.methods.method import list_parameters
from hf_dpzo.privacy.accounting import NEIGHBORING_RELATION, event_tree
from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery, NonPrivateQuery
from hf_dpzo.privacy.rounding import round_up
from hf_dpzo.trajectory.initial import INITIAL_FILE
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
from hf_dpzo.trajectory.parts import Part
from hf_dpzo.trajectory.run import LoggedRun


SCHEMA = "hf-dpzo/privacy@3"


NOT_COVERED = (
    "the data that the base model was pretrained on",
    "choices made by looking at private data, such as hyperparameters, templates and label words: {tuning}",
    "the evaluation figures, which were computed on data {evaluation}; that these hold no training row was not checked",
    "other runs on the same rows: a card counts {counted}",
    "{more_than_the_unit}",
    "the number of training {units}, which is treated as public",
    "what happened to the data before training, such as filtering or removing duplicates",
    "the time and the memory that training took, whether it crashed, and whoever could watch the machine",
    "what is true of everybody in the data, and would be learned without any one of them",
)


NOISE_DESCRIPTIONS = {
    GaussianQuery: "discrete Gaussian, one draw for each direction and step",
    LaplaceQuery: "discrete Laplace, one draw for each direction and step",
    NonPrivateQuery: "none",
}


# The Hub's name of the task for each of transformers' names of heads.
TASKS = {
    "CausalLM": "text-generation",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
}


# The parameters of methods that have fields of their own in the statement.
_NAMED_PARAMETERS = {
    "clip_norm",
    "difference",
    "expected_batch_size",
    "noise",
    "noise_multiplier",
    "num_directions",
    "smoothing",
}


def build_statement(folder: str | Path, declarations: Declarations) -> dict[str, Any]:
    """Build the content of `privacy.json` for the log in `folder`: what is claimed, for what, and from what it follows.

    Args:
        folder: the folder of the log.
        declarations: facts that the log cannot tell.

    Raises:
        TrajectoryError: there is no log, or it does not describe a run.
    """
    folder = Path(folder)
    log = Trajectory.read(folder)
    run = LoggedRun.from_log(log)
    isolation = worst_isolation([declarations.isolation, *(part.environment["isolation"] for part in log.parts)])
    conditions = list_conditions(run, declarations, isolation)
    private = all(condition["held"] for condition in conditions)
    return {
        "schema": SCHEMA,
        "status": "differentially_private" if private else "NOT_PRIVATE",
        "claim": build_claim(run) if private else None,
        "meaning": build_meaning(run) if private else None,
        "mechanism": _mechanism(run),
        "sampling": _sampling(run),
        "accounting": _accounting(run) if private else None,
        "randomness": _randomness(run),
        "validity_checks": {
            "conditions": conditions,
            "numerical_isolation": dict(isolation),
            "audit": declarations.audit,
            **({} if declarations.empirical is None else {"empirical": dict(declarations.empirical)}),
            "non_finite_losses": "count as zero",
        },
        "not_covered": _list_not_covered(run, declarations),
        "tuning": {
            "runs_on_private_data": declarations.tuning_runs,
            "accounted": run.budget.trials > 1 and run.budget.trials == declarations.tuning_runs,
        },
        "training": {
            "trained": "adapter" if run.header["adapter"] else "all parameters",
            "hyperparameters": dict(declarations.hyperparameters),
            "dataset": list(declarations.dataset),
            "task": declarations.task or _find_task(run.header["base"]),
            **_describe_invocation(run.header["adapter"]),
            **{name: run.header[name] for name in ("calibration", "recipe") if name in run.header},
        },
        "evaluation": {
            "data_are_public": declarations.eval_data_is_public,
            "metrics": dict(declarations.metrics),
            "after_step": declarations.metrics_step,
            "history": [dict(metrics) for metrics in declarations.history],
        },
        "reproducibility": _reproducibility(folder, run, declarations),
        "versions": dict(declarations.versions),
        **({"software": dict(SOFTWARE)} if declarations.names_software else {}),
        **_describe_parts(log.parts),
        **({} if declarations.data_ledger is None else {"data_ledger": dict(declarations.data_ledger)}),
    }


def _describe_invocation(adapter: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the tokens that activate the adapter; nothing for one that is always active."""
    tokens = None if adapter is None else adapter["config"].get("alora_invocation_tokens")
    return {} if tokens is None else {"invocation": list(tokens)}


def _describe_parts(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the parts of a run that went on in another environment; nothing for a run of one part."""
    if len(parts) == 1:
        return {}
    names = ("isolation", "versions", "device", "processes")  # Earlier versions kept no device and no processes.
    return {
        "parts": [
            {"first_step": part.first_step, **{name: part.environment.get(name) for name in names}} for part in parts
        ]
    }


def _mechanism(run: LoggedRun) -> dict[str, Any]:
    method = run.method
    query = run.budget.query
    private = run.budget.private
    others = sorted(list_parameters(type(method)) - _NAMED_PARAMETERS)
    return {
        "method": run.method_name,
        "paper": dataclasses.asdict(method.paper),
        "num_directions": method.estimator.num_directions,
        "difference": method.difference,
        "smoothing": method.smoothing,
        "clip_norm": method.clip_norm if "clip_norm" in list_parameters(type(method)) else None,
        "clipped": method.clipped,
        "noise": NOISE_DESCRIPTIONS[type(query)],
        "noise_multiplier": query.noise_multiplier if private else None,
        "noise_unit": method.noise_unit,
        "sensitivity": "exact, in integers of 2**-40 clip norms, given each row's losses" if private else None,
        "divided_by": f"the expected batch size, {run.expected_batch_size}, a public constant" if private else None,
        "parameters": {name: getattr(method, name) for name in others} | _describe_scales(run.header),
        "update": {"rule": type(run.update).__name__, **_as_json(run.update)},
    }


def _describe_scales(header: Mapping[str, Any]) -> dict[str, str]:
    """Return the scales of directions in words; nothing where they are all one."""
    if "scales" not in header:
        return {}
    total = sum(len(group["parameters"]) for group in header["groups"])
    counts = Counter(header["scales"].values())
    told = ", ".join(f"{scale:g} for {count}" for scale, count in sorted(counts.items()))
    return {"perturbation_scales": f"{told} of {total} parameters"}


def _sampling(run: LoggedRun) -> dict[str, Any]:
    return {
        "scheme": f"Poisson: each {run.unit_name} joins each batch independently",
        "sampling_rate": run.sampling_rate,
        "expected_batch_size": run.expected_batch_size,
        "largest_batch_size": None,
        "num_units": run.num_units,
        "num_rows": run.num_rows,
        "unit_column": run.unit_column,
        "max_rows_per_unit": run.max_rows_per_unit,
        "padded_lengths": run.padded_lengths,
        **({"canaries": run.num_canaries} if run.num_canaries else {}),
    }


def _accounting(run: LoggedRun) -> dict[str, Any]:
    budget = run.budget
    spent = budget.guarantee()
    bounds = {"epsilon_pld": spent.pld, "epsilon_rdp": spent.rdp, "epsilon_pure": spent.pure}
    return {
        "library": "dp-accounting",
        "neighboring_relation": NEIGHBORING_RELATION.name,
        "ledger": [
            {"query": type(query).__name__, **_as_json(query), "count": n} for query, n in budget.claimed_releases
        ],
        "event": event_tree(budget.claimed_releases),
        **{name: None if bound is None else round_up(bound) for name, bound in bounds.items()},
        "reported": "the smallest of the upper bounds, rounded up",
    }


def _randomness(run: LoggedRun) -> dict[str, Any]:
    directions = run.header["directions"]
    return {
        "noise": "OpenDP, from the operating system; kept nowhere" if run.budget.private else "none",
        "batches": "the operating system (os.urandom); kept nowhere",
        "directions": {"distribution": directions["name"], "seed": directions["seed"], "public": True},
    }


def _list_not_covered(run: LoggedRun, declarations: Declarations) -> list[str]:
    more_rows = "more than one row of the same person: the unit is a row"
    if run.unit_column is not None:
        more_rows = f"whether column {run.unit_column} names all rows of the same person: what it says is trusted"
    trials = run.budget.trials
    counted = "its own run alone" if trials == 1 else f"the {trials} runs that it is one of"
    counted += ", and the earlier ones that it was told of" if run.budget.earlier else ""
    counted += "" if declarations.counted_runs is None else "; what all runs of its ledger come to stands in it too"
    facts = {
        "counted": counted,
        "evaluation": "declared public" if declarations.eval_data_is_public else "that were not declared public",
        "more_than_the_unit": more_rows,
        "tuning": _describe_tuning(declarations.tuning_runs, trials, counted=declarations.counted_runs),
        "units": f"{run.unit_name}s",
    }
    lines = [line for line in NOT_COVERED if declarations.metrics or "{evaluation}" not in line]
    return [line.format(**facts) for line in lines] + _list_beginnings(run.header.get("began_from"))


def _list_beginnings(began_from: Mapping[str, Any] | None) -> list[str]:
    """Say what made the weights that a run began with, if another training is known to have made them."""
    if began_from is None:
        return []
    if began_from["epsilon"] is None:
        return [
            "the training that made the adapter which this run began with: on the same rows, what both spent adds up"
        ]
    return [
        "the private run that made what this run began with, whose guarantee is its own (epsilon = "
        f"{began_from['epsilon']}, delta = {began_from['delta']}): on the same rows, both add up"
    ]


def _describe_tuning(runs: int | None, trials: int, *, counted: int | None) -> str:
    """Say how many runs the choices were made from, as far as declared, and how many of them the guarantee covers."""
    if trials == 1 and runs is None and counted is not None and counted > 1:
        return f"how many of the {counted} runs that the ledger counts they took is not told"
    if trials == 1:
        return "how many runs they took is not told" if runs is None else f"{runs} runs in all, not accounted"
    if runs is None:
        return f"{trials} runs are accounted, and whether there were others is not told"
    if runs == trials:
        return f"{runs} runs in all, which are accounted; what else was looked at is not"
    return f"{runs} runs in all, of which {trials} are accounted"


def _reproducibility(folder: Path, run: LoggedRun, declarations: Declarations) -> dict[str, Any]:
    base = run.header["base"]
    return {
        "log": describe_file(folder / LOG_FILE),
        "initial_values": describe_file(folder / INITIAL_FILE) if (folder / INITIAL_FILE).is_file() else None,
        "weights": None if declarations.weights is None else dict(declarations.weights),
        "base_model": {
            "name": base["name"],
            "revision": base["revision"],
            "architecture": base["architecture"],
            "frozen_sha256": base["frozen"],
            **{name: base[name] for name in ("dtype", "quantization", "features") if name in base},
        },
        "replays_on": run.header["replays_on"],
        "repository": declarations.repository,
    }


def _find_task(base: Mapping[str, Any]) -> str | None:
    """Return the Hub's name of the task of the model that `base` in a header describes."""
    return "text-classification" if "features" in base else TASKS.get(base["architecture"].rpartition("For")[2])


def describe_file(path: Path) -> dict[str, Any]:
    """Return the name of a file, and the SHA-256 and the size in bytes of its content."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "sha256": digest, "bytes": path.stat().st_size}


def _as_json(instance: Any) -> dict[str, Any]:
    """Return the fields of a dataclass in JSON types."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(instance).items()}
