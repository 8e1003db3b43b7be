"""The guarantee, written down: `privacy.json` for machines and `README.md` for people, beside the weights.

Every number about privacy is computed from the ledger. Nothing here takes an epsilon.
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_dpzo.accounting import NEIGHBORING_RELATION, group_epsilon, replace_one_epsilon
from hf_dpzo.audit import Audit
from hf_dpzo.isolation import Isolation, isolation_bound
from hf_dpzo.ledger import Budget, round_up
from hf_dpzo.methods import Method
from hf_dpzo.methods.method import parameters_of
from hf_dpzo.queries import GaussianQuery, LaplaceQuery, NonPrivateQuery
from hf_dpzo.updates import Update


SCHEMA = "hf-dpzo/privacy@2"
TAGS = ("zeroth-order", "hf-dpzo")
# Not for a run without noise, which must not be found by it.
PRIVATE_TAGS = ("differential-privacy", *TAGS)
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PACKAGES = ("hf_dpzo", "dp-accounting", "opendp", "torch", "transformers", "accelerate", "peft", "datasets")
NOT_COVERED = (
    "the data that the base model was pretrained on",
    "choices made by looking at private data: hyperparameters, templates, label words, the number of attempts",
    "the evaluation figures, which were computed on data {evaluation}; that these hold no training row was not checked",
    "other runs on the same rows: a card counts its own run alone",
    "{more_than_the_unit}",
    "the number of training {units}, which is treated as public",
    "what happened to the data before training, such as filtering or removing duplicates",
    "the time and the memory that training took, whether it crashed, and whoever could watch the machine",
)
# Parameters of methods that have rows of their own.
SHOWN_PARAMETERS = {
    "clip_norm",
    "difference",
    "expected_batch_size",
    "noise",
    "noise_multiplier",
    "num_directions",
    "paper_noise",
    "smoothing",
}
NOISE = {
    GaussianQuery: "discrete Gaussian (OpenDP), one draw for each direction and step",
    LaplaceQuery: "discrete Laplace (OpenDP), one draw for each direction and step",
    NonPrivateQuery: "none",
}
# Rows of one person, where the unit is a row.
GROUPS = (2, 4)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a card is written about.

    Args:
        method_name: the method's name in `METHODS`.
        method: the method with its parameters.
        budget: its plan and ledger.
        update: what becomes of released coefficients.
        directions: the name of the directions' distribution.
        seed: the public seed of the directions.
        base_model: what was fine-tuned.
        peft: whether an adapter was trained, instead of the model's own parameters.
        num_rows: number of training rows.
        num_units: number of units of privacy.
        unit_column: the column that says whose a row is; `None` where the unit is a row.
        max_rows_per_unit: how many rows of a unit a batch held at most; `None` where the unit is a row.
        expected_batch_size: units in a batch on average.
        sampling_rate: the probability with which each unit joined a batch.
        isolation: what the probe measured; `None` before training, and where nothing is promised.
        fixed_shapes: whether a row's shape and neighbours' shapes are public, or it has no neighbours.
        audit: what an attack on the mechanism found; `None` where none was made.
        eval_data_is_public: whether the evaluation data were declared public.
        metrics: the metrics of the last evaluation.
        hyperparameters: what else the card lists of how the model was trained.
    """

    method_name: str
    method: Method
    budget: Budget
    update: Update
    directions: str
    seed: int
    base_model: str
    peft: bool
    num_rows: int
    num_units: int
    unit_column: str | None
    max_rows_per_unit: int | None
    expected_batch_size: int
    sampling_rate: float
    isolation: Isolation | None
    fixed_shapes: bool
    audit: Audit | None
    eval_data_is_public: bool
    metrics: dict[str, float]
    hyperparameters: dict[str, Any]


def write_card(run: Run, folder: str | Path) -> None:
    """Write `privacy.json` and `README.md` into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    statement = privacy_statement(run)
    (folder / "privacy.json").write_text(json.dumps(statement, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    render(run, statement).save(folder / "README.md")


def privacy_statement(run: Run) -> dict[str, Any]:
    """Return what `privacy.json` says: what is claimed, for what, and from which facts it follows."""
    return {
        "schema": SCHEMA,
        "status": "differentially_private" if run.budget.private else "NOT_PRIVATE",
        "claim": _claim(run) if run.budget.private else None,
        "mechanism": _mechanism(run),
        "sampling": {
            "scheme": f"Poisson: each {_one(run)} joins each batch independently",
            "sampling_rate": run.sampling_rate,
            "expected_batch_size": run.expected_batch_size,
            "num_units": run.num_units,
            "num_rows": run.num_rows,
            "randomness": "operating system (os.urandom), kept nowhere",
        },
        "accounting": _accounting(run.budget) if run.budget.private else None,
        "directions": {"distribution": run.directions, "seed": run.seed, "public": True},
        "numerical_isolation": _isolation(run),
        "audit": None if run.audit is None else run.audit.as_json(),
        "not_covered": _not_covered(run),
        "base_model": run.base_model,
        "versions": {
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            "python": platform.python_version(),
        },
    }


def _claim(run: Run) -> dict[str, Any]:
    budget = run.budget
    return {
        "definition": "(epsilon, delta)-differential privacy",
        "epsilon": round_up(budget.stated().epsilon),
        "delta": budget.delta,
        "unit": _unit(run),
        "neighboring_relation": NEIGHBORING_RELATION.name,
        "released": ["weights", "all intermediate weights", "the released coefficients", "the training log"],
        "steps_taken": len(budget.ledger),
        "steps_claimed": sum(count for _, count in budget.claimed),
        "best_membership_accuracy": round_up(budget.membership_accuracy()),
        "groups": _groups(run),
        "also": _also(run),
    }


def _one(run: Run) -> str:
    return "row" if run.unit_column is None else "user"


def _unit(run: Run) -> str:
    if run.unit_column is None:
        return "one row of the training data"
    return (
        f"all rows of one user (column {run.unit_column}), of which a batch holds at most {run.max_rows_per_unit}, as "
        "one clipped mean"
    )


def _groups(run: Run) -> list[dict[str, Any]]:
    """What holds for people with several rows, where the unit is a row."""
    if run.unit_column is not None:
        return []
    budget = run.budget
    found = {size: group_epsilon(budget.claimed, size=size, delta=budget.delta) for size in GROUPS}
    return [{"rows": size, "epsilon": round_up(epsilon)} for size, epsilon in found.items() if math.isfinite(epsilon)]


def _isolation(run: Run) -> dict[str, Any]:
    """How far rows of a batch were kept apart, as measured before training."""
    if run.isolation is None:
        return {"status": "not measured", "bound_in_clip_norms": None}
    if run.isolation.bitwise and run.fixed_shapes:
        return {"status": "bitwise", "bound_in_clip_norms": 0.0}
    bound = isolation_bound(run.method, run.budget.planned_steps, run.isolation.moved)
    return {"status": "bounded", "bound_in_clip_norms": float(f"{bound:.2g}")}


def _also(run: Run) -> list[dict[str, Any]]:
    """What the same run guarantees in other terms."""
    budget, found = run.budget, []
    pure = budget.stated().pure
    if pure is not None:
        found.append(("pure epsilon-differential privacy", pure, 0, NEIGHBORING_RELATION.name))
    if run.method.noise_for_replacing:
        epsilon = replace_one_epsilon(budget.claimed, delta=budget.delta)
        if math.isfinite(epsilon):
            found.append(("(epsilon, delta)-differential privacy", epsilon, budget.delta, "REPLACE_ONE"))
    return [
        {"definition": definition, "epsilon": round_up(epsilon), "delta": delta, "neighboring_relation": relation}
        for definition, epsilon, delta, relation in found
    ]


def _accounting(budget: Budget) -> dict[str, Any]:
    spent = budget.stated()
    return {
        "ledger": [
            {**dataclasses.asdict(query), "query": type(query).__name__, "count": n} for query, n in budget.claimed
        ],
        "epsilon_pld": None if spent.pld is None else round_up(spent.pld),
        "epsilon_rdp": None if spent.rdp is None else round_up(spent.rdp),
        "epsilon_pure": None if spent.pure is None else round_up(spent.pure),
        "reported": "the smallest of the upper bounds, rounded up",
    }


def _mechanism(run: Run) -> dict[str, Any]:
    return {
        "method": run.method_name,
        "title": run.method.paper.title,
        "url": run.method.paper.url,
        **dataclasses.asdict(run.method),
        **({"noise_multiplier": run.budget.query.noise_multiplier} if run.budget.private else {}),
        "num_directions": run.method.estimator.num_directions,
        "noise": NOISE[type(run.budget.query)],
        "sensitivity": "exact, in integers of 2**-40 clip norms, given each row's losses"
        if run.budget.private
        else "not used: there is no claim",
        "clipped": run.method.clipped,
        "noise_unit": run.method.noise_unit,
        "update": {"rule": type(run.update).__name__, **dataclasses.asdict(run.update)},
    }


def _not_covered(run: Run) -> list[str]:
    evaluation = "declared public" if run.eval_data_is_public else "that were not declared public"
    more = "more than one row of the same person: the unit is a row"
    if run.unit_column is not None:
        more = f"whether column {run.unit_column} names all rows of the same person: what it says is trusted"
    units = "rows" if run.unit_column is None else "users"
    return [line.format(evaluation=evaluation, more_than_the_unit=more, units=units) for line in NOT_COVERED]


def render(run: Run, statement: dict[str, Any]) -> ModelCard:
    """Return the card for people."""
    data = ModelCardData(
        base_model=run.base_model or None,
        library_name="peft" if run.peft else "transformers",
        tags=list(PRIVATE_TAGS if run.budget.private else TAGS),
    )
    if run.budget.private:
        claim = statement["claim"]
        data.differential_privacy = {name: claim[name] for name in ("epsilon", "delta", "unit", "neighboring_relation")}
        pure = statement["accounting"]["epsilon_pure"]
        if pure is not None:
            data.differential_privacy["pure_epsilon"] = pure
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        run=run,
        title=f"{run.base_model.split('/')[-1] or 'Model'}, fine-tuned by {run.method_name}",
        paper=run.method.paper,
        other_parameters=sorted(parameters_of(type(run.method)) - SHOWN_PARAMETERS),
        statement=statement,
        metrics={name: value for name, value in run.metrics.items() if _is_shown(name, value)},
    )


def _is_shown(metric: str, value: float) -> bool:
    """Whether a metric says something of the model, and not of the machine."""
    return not (math.isnan(value) or metric.endswith(("_runtime", "_per_second", "_preparation_time")))
