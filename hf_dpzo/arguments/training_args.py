"""The flags of a run: all those of `transformers.TrainingArguments`, and those that zeroth-order training adds."""

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_dpzo.arguments.checks import PARALLEL_MODES, check_values
from hf_dpzo.arguments.coercion import ALL_UNITS
from hf_dpzo.arguments.foreign import explains_foreign_names
from hf_dpzo.arguments.method_args import build_update
from hf_dpzo.arguments.plan import PLANNED_FLAGS, plan_run
from hf_dpzo.arguments.rates import choose_learning_rate
from hf_dpzo.arguments.unsupported import refuse_arguments, refuse_given_arguments
from hf_dpzo.data.units import Units
from hf_dpzo.frozen.store import CACHE_DTYPES, CACHE_PLACES
from hf_dpzo.methods import METHODS, Method, PrivateMethod
from hf_dpzo.methods.zopo import MASK_SCHEDULES
from hf_dpzo.privacy.ledger import Budget
from hf_dpzo.privacy.mechanism import NOISES
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.spsa import DIFFERENCES
from hf_dpzo.zo.updates import UPDATES, Update


@explains_foreign_names
@dataclass
class ZOTrainingArguments(TrainingArguments):
    """`TrainingArguments` for differentially private zeroth-order training.

    The privacy of a run is set by `target_epsilon` and `target_delta`, or by `noise_multiplier` and `target_delta`.
    `seed` is public: it determines the directions, never the noise. `per_device_train_batch_size` is the number of rows
    that are evaluated at once; it changes memory and speed, not what is learned.

    Changed defaults: `learning_rate` follows from the noise, see `choose_learning_rate`; `logging_steps` is 10, and
    `max_grad_norm` is 0, because there is no gradient to clip.

    >>> args = ZOTrainingArguments(output_dir="out", target_epsilon=2, target_delta=1e-5, max_steps=100)
    >>> method, budget = args.plan(num_units=5000)
    >>> round(method.noise_multiplier, 2), budget.planned_steps
    (0.78, 100)
    """

    method: str = field(default="dpzero", metadata={"help": "The published method.", "choices": sorted(METHODS)})
    target_epsilon: float | None = field(
        default=None, metadata={"help": "The epsilon that the noise is calibrated for. Excludes noise_multiplier."}
    )
    target_delta: float | None = field(
        default=None, metadata={"help": "The delta of the guarantee; well below one over the number of rows."}
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "The noise's scale over the sensitivity: a standard deviation in clip norms (zoso, zopo: sqrt(K) "
            "of them; with paper_noise twice that is drawn), or Laplace's b. Excludes target_epsilon."
        },
    )
    clip_norm: float | None = field(
        default=None,
        metadata={
            "help": "The largest norm of one example's coefficients; small values act like signs; default 1. For dpzo "
            "the largest difference of its losses; default 0.05."
        },
    )
    smoothing: float | None = field(
        default=None, metadata={"help": "Distance from the parameters to a probe point, in directions; default 1e-3."}
    )
    num_directions: int | None = field(
        default=None, metadata={"help": "Directions per step (K); default 16 for aggzo and 1 for the others."}
    )
    difference: str | None = field(
        default=None,
        metadata={
            "help": "central, or forward: biased, but K + 1 forward passes instead of 2K; default central.",
            "choices": sorted(DIFFERENCES),
        },
    )
    noise: str | None = field(
        default=None,
        metadata={
            "help": "dpzo: gaussian, or laplace, for which target_epsilon is pure, with delta 0; default gaussian.",
            "choices": sorted(NOISES),
        },
    )
    paper_noise: bool = field(
        default=False, metadata={"help": "dpzero: twice the noise, as in the paper, for less epsilon than the target."}
    )
    num_stages: int | None = field(
        default=None, metadata={"help": "zoso, zopo: stages, each twice as long as the one before; default 3."}
    )
    final_smoothing: float | None = field(
        default=None, metadata={"help": "zoso, zopo: smoothing of the last stage; default that of the first."}
    )
    anchor_strength: float | None = field(
        default=None,
        metadata={
            "help": "zoso, zopo: pull towards where a stage began (rho), which costs a copy; 0 for none; default 5e-4."
        },
    )
    pruning_ratio: float | None = field(
        default=None, metadata={"help": "zopo: the share of coordinates that are trained; default 0.01."}
    )
    mask: str | None = field(
        default=None,
        metadata={
            "help": "zopo: choose them once (static) or for each stage (dynamic); default static.",
            "choices": sorted(MASK_SCHEDULES),
        },
    )
    radius: float | None = field(
        default=None, metadata={"help": "projected: of the ball around the initial parameters, L2."}
    )
    update: str = field(
        default="sgd",
        metadata={
            "help": "What released coefficients do: sgd; momentum or adam, which keep state, so for adapters (adam "
            "reads adam_beta1, adam_beta2 and adam_epsilon); or normalized, by the spread of the K coefficients. None "
            "of them did better than sgd by half a point where all were tuned.",
            "choices": sorted(UPDATES),
        },
    )
    momentum: float | None = field(default=None, metadata={"help": "update=momentum: what a step keeps; default 0.9."})
    # The parser of command lines takes text for this type.
    expected_batch_size: int | str | None = field(
        default=64,
        metadata={
            "help": "Rows (or users) in a batch on average; a public constant. Each batch is a Poisson sample; all: "
            "every row, in each step."
        },
    )
    privacy_unit_column: str | None = field(
        default=None, metadata={"help": "Protect all rows of a user together: the column that says whose a row is."}
    )
    max_rows_per_unit: int | None = field(
        default=None, metadata={"help": "privacy_unit_column: how many of a user's rows a batch may hold; default 8."}
    )
    padded_lengths: list[int] | None = field(
        default=None,
        metadata={
            "help": "Public lengths in tokens that rows are padded to, in full micro-batches, so that no row moves "
            "another's loss even in the last bit. Rows that are longer than all of them contribute nothing."
        },
    )
    points_per_pass: int | None = field(
        default=None, metadata={"help": "Adapters: most probe points of one pass; default 1, or 8 after an invocation."}
    )
    frozen_cache: str = field(
        default="none",
        metadata={
            "help": "Keep what an adapter does not change of each row for the run: in memory, or in a nameless file.",
            "choices": list(CACHE_PLACES),
        },
    )
    frozen_cache_dtype: str = field(
        default="float32", metadata={"help": "frozen_cache: the type of its numbers.", "choices": list(CACHE_DTYPES)}
    )
    parallel: str = field(
        default="examples",
        metadata={
            "help": "What several processes share out: the examples of a batch, or the probe points of its directions.",
            "choices": sorted(PARALLEL_MODES),
        },
    )
    directions: str = field(
        default="rademacher",
        metadata={
            "help": "Distribution of the directions. gaussian cost a point; sphere is there for theory.",
            "choices": sorted(DIRECTIONS),
        },
    )
    perturbation_scales: dict | str | None = field(
        default=None,
        metadata={
            "help": "As JSON, {part of a parameter's name: scale}: factors on smoothing and learning_rate, for kinds "
            "of parameters whose coefficients differ by orders of magnitude; default 1 for all."
        },
    )
    audit: bool = field(
        default=False, metadata={"help": "Attack the mechanism first, some 20 seconds; the card says what was found."}
    )
    canaries: int | None = field(
        default=None,
        metadata={
            "help": "Add as many made-up rows, each in or out by a secret coin, so that the run itself can be audited "
            "afterwards: hf-dpzo audit --run. They count as rows."
        },
    )
    tuning_runs: int | None = field(
        default=None,
        metadata={
            "help": "How many runs on these rows choices were made from, this one among them. The card says so; "
            "those beyond trials are not accounted."
        },
    )
    trials: int = field(
        default=1,
        metadata={"help": "How many such runs are made on these rows, this one among them: epsilon covers them all."},
    )
    earlier_runs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders of earlier private runs on these rows, such as the one that made the adapter this run "
            "goes on from: epsilon covers what they released too."
        },
    )
    privacy_ledger: str | None = field(
        default=None,
        metadata={
            "help": "A file beside the data, on a local disk, that counts all runs on these rows: this one is entered "
            "before its first step, and refused beyond the budget set there. See hf-dpzo ledger."
        },
    )
    report_failed_rows: float | None = field(
        default=None,
        metadata={
            "help": "The share of the budget, such as 0.02, that pays for a noisy count of the rows on which training "
            "fails, shown at the end; default none."
        },
    )
    push_trajectory: bool = field(
        default=False, metadata={"help": "What is pushed to the Hub is the log, from which the weights follow."}
    )
    eval_data_is_public: bool = field(
        default=False,
        metadata={"help": "Declares that nobody's privacy depends on the evaluation data, so they may steer the run."},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate, per unit of coefficient; by default the noise of the whole run moves a parameter "
            "as far as smoothing, and 1e-4 without noise."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every X steps."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Unused: there is no gradient. See clip_norm."})

    def __post_init__(self) -> None:
        # The learning rate that was chosen for a run, where none was set.
        self.chosen_rate: float | None = None
        self.check_values()
        refuse_given_arguments(self)
        super().__post_init__()
        refuse_arguments(self)

    @property
    def planned_values(self) -> dict[str, Any]:
        """The values that a run is planned from. Once it is planned, none of them may change."""
        return {name: copy.deepcopy(getattr(self, name)) for name in PLANNED_FLAGS}  # A list could be added to.

    @property
    def private(self) -> bool:
        """Whether the method adds noise."""
        return issubclass(METHODS[self.method], PrivateMethod) and self.noise_multiplier != 0

    def build_units(self, dataset: Any) -> Units:
        """Return the units of privacy that the rows of `dataset` belong to, and after them the canaries."""
        if dataset is None:
            return Units(num_rows=0)
        if self.privacy_unit_column is None:
            units = Units(num_rows=len(dataset))
        else:
            units = Units.from_column(dataset, self.privacy_unit_column, max_rows=self.max_rows_per_unit)
        return units.with_single_rows(self.canaries or 0)

    @property
    def unit_name_plural(self) -> str:
        """The word for the units of privacy in messages: rows or users."""
        return "rows" if self.privacy_unit_column is None else "users"

    def sampling_rate(self, num_units: int) -> float:
        """Return the probability that a unit takes part in a batch. Sampler, accountant and card all use this value."""
        return self.resolve_batch_size(num_units) / num_units

    def resolve_batch_size(self, num_units: int) -> int:
        """Return the number of units in a batch on average, which is all of them for `expected_batch_size=all`."""
        return num_units if self.expected_batch_size == ALL_UNITS else self.expected_batch_size

    def plan(self, num_units: int) -> tuple[Method, Budget]:
        """Return the method with its noise set, and the budget of its run over `num_units` units of privacy.

        Raises:
            ValueError: the units are fewer than `expected_batch_size`, or delta is too large for them.
        """
        return plan_run(self, num_units)

    def settle_learning_rate(self, method: Method, planned_steps: int) -> None:
        """Choose the learning rate of a run of `method`, unless one is set."""
        if self.learning_rate is None or self.learning_rate == self.chosen_rate:
            self.chosen_rate = choose_learning_rate(method, steps=planned_steps, update=self.update_rule)
            self.learning_rate = self.chosen_rate

    @property
    def update_rule(self) -> Update:
        """The rule that turns released coefficients into an update, with its parameters."""
        return build_update(self)

    def check_values(self) -> None:
        """Coerce and check the fields that this class adds. YAML reads numbers such as 1e-6 as text."""
        check_values(self)
