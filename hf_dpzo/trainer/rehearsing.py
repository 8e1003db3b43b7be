"""The joining Trainer, made to plan: all that training does before its first look at a private row, and no more."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch

from hf_dpzo.arguments.rates import EARLIER_DEFAULT, is_earlier_default
from hf_dpzo.auditing.coins import Coins
from hf_dpzo.data.cutting import count_tokens
from hf_dpzo.data.sampling import expected_drawn_rows
from hf_dpzo.frozen.shared import SharedWork
from hf_dpzo.isolation.measure import Rows
from hf_dpzo.isolation.synthetic_rows import PROBE_LENGTHS, generate_rows
from hf_dpzo.losses.per_example import IGNORE_INDEX
from hf_dpzo.privacy.clipping import SENSITIVITY
from hf_dpzo.privacy.mechanism import NoisySum
from hf_dpzo.step.descent import is_copied
from hf_dpzo.trainer.callbacks import FirstStepGuard
from hf_dpzo.trainer.joined import JoiningTrainer
from hf_dpzo.trainer.limits import SEEN_AMONG, describe_limits
from hf_dpzo.trainer.memory import count_model_bytes
from hf_dpzo.trainer.step_trial import StepTrial, time_stops
from hf_dpzo.trainer.training_plan import PERSONS, Promise, TrainingPlan
from hf_dpzo.trajectory.log import encode_start
from hf_dpzo.trajectory.unwritten import UnwrittenLog


# As many steps of a log are looked at for the rate that a run began with.
MOST_WARMUP_STEPS = 1000


class RehearsalEndError(Exception):
    """Ends a rehearsal, where training would have its first look at a private row."""


class RehearsingTrainer(JoiningTrainer):
    """A joining Trainer that can say what a run will promise, cost and take.

    Guarantee: a rehearsal writes nothing, and evaluates no private row. Of the rows it reads what training reads before
    it begins: their number, which is public, and what nearly all of the first ones have in common.
    """

    _is_rehearsing = False
    # The size of the log that the rehearsed run would write.
    _log_bytes: int | None = None

    def plan(self) -> TrainingPlan:
        """Return what training will promise, cost and take, and what of it would be refused.

        Checks all that `train` checks before its first step, on made-up or public rows, and times a few probe points
        of a step. The run may be trained afterwards.

        Raises:
            ValueError: the trainer has no rows to train on.
        """
        if self.budget is None:
            raise ValueError("train_dataset=None: a run is planned for rows; pass train_dataset.")
        started = time.perf_counter()
        refusal = self.rehearse()
        before = time.perf_counter() - started
        told = self._describe_budget()
        if refusal is not None:
            return replace(told, refusals=(refusal,))
        try:
            trial = self._try_step()
        except Exception as error:  # Nothing says that made-up rows of another length suit a loss.
            return replace(told, seconds_before=before, log_bytes=self._log_bytes, missing=(_describe_error(error),))
        return replace(
            told,
            log_bytes=self._log_bytes,
            seconds_before=before,
            seconds_reading=trial.reading,
            seconds_per_step=trial.seconds_per_step,
            memory_bytes=trial.memory_bytes,
            tried=trial.rows,
        )

    def rehearse(self) -> str | None:
        """Begin to train, up to the first look at a private row; return why that would be refused, if it would."""
        self._is_rehearsing, self._limits = True, None
        try:
            self.train()
        except RehearsalEndError:
            return None
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            return " ".join(str(error).split())
        finally:
            self._is_rehearsing = self.is_in_train = False
        raise RuntimeError("a rehearsal trained, because get_train_dataloader or train was replaced.")

    # ---- What a rehearsal leaves out ----

    def _find_log(self, resume: bool | str) -> None:
        """Find the log to resume, or check that there is none; in a rehearsal, begin one that is never written."""
        if not self._is_rehearsing:
            super()._find_log(resume)
            self._adopt_earlier_rate()
            return
        self.budget.require_steps(self.budget.planned_steps)
        if self._has_ledger:  # A plan begins none.
            self._refuse_beyond_budget()
        self._earlier_runs = self._read_earlier_runs()
        self._log = UnwrittenLog()

    def _adopt_earlier_rate(self) -> None:
        """Go on with the learning rate that earlier versions took by default, where a run began with that."""
        args, log = self.args, self._log.existing
        rates = [record.learning_rates[0] for record in islice(log.records, MOST_WARMUP_STEPS)] if log else []
        warmup = args.get_warmup_steps(self.budget.planned_steps)
        if args.chosen_rate is not None and is_earlier_default(rates, warmup_steps=warmup):
            args.learning_rate = args.chosen_rate = EARLIER_DEFAULT
            self.optimizer_cls_and_kwargs[1]["lr"] = EARLIER_DEFAULT
            self._planned_values = args.planned_values

    def _open_log(self, header: dict[str, Any], model: torch.nn.Module) -> None:
        """Open the log, but end a rehearsal here, after what is tried on public rows when training begins."""
        if not self._is_rehearsing:
            super()._open_log(header, model)
            return
        _, self._log_bytes = encode_start(header)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FirstStepGuard):
                callback.on_train_begin(self.args, self.state, self.control, model=model, optimizer=self.optimizer)
        raise RehearsalEndError

    def _build_public_batches(self, dataset: Any) -> list[Rows]:
        """Return batches of public rows; in a rehearsal, of the shortest shape alone. Training tries all of them."""
        batches = super()._build_public_batches(dataset)
        return batches[:1] if self._is_rehearsing else batches

    def _load_or_flip_coins(self) -> Coins:
        return Coins.flip(self.args.canaries) if self._is_rehearsing else super()._load_or_flip_coins()

    def _report_limits(self) -> None:
        """Say what limits the run; a plan says it itself."""
        if not self._is_rehearsing:
            super()._report_limits()

    # ---- What is planned ----

    def _describe_budget(self) -> TrainingPlan:
        """Return the plan as far as it follows from the arguments and the number of rows."""
        args, budget, units = self.args, self.budget, self._num_units
        size = args.resolve_batch_size(units)
        told = TrainingPlan(
            method=args.method,
            units=units,
            unit="row" if args.privacy_unit_column is None else "user",
            rows=self._units.public_facts["rows"],
            batch_size=size,
            steps=budget.planned_steps,
            evaluated=budget.planned_steps * size,
            passes=self.method.estimator.forward_passes,
            trials=budget.trials,
            sampling_rate=args.sampling_rate(units),
            ledger=self._describe_ledger(),
        )
        if self._has_ledger:
            facts = self._preview_ledger().for_card()
            told = replace(told, ledger_runs=facts["runs"], ledger_epsilon=facts["epsilon"])
        if not budget.private:
            return told
        persons = PERSONS if args.privacy_unit_column is None else PERSONS[:1]
        mechanism = self.method.mechanism
        has_scale = isinstance(mechanism, NoisySum)
        return replace(
            told,
            delta=budget.delta,
            noise_multiplier=budget.query.noise_multiplier,
            pure_epsilon=budget.guarantee().pure,
            promises=tuple(Promise.of(budget, rows) for rows in persons),
            noise_share=mechanism.noise_scale / SENSITIVITY / size if has_scale else None,
            **self._describe_found_limits(),
        )

    def _describe_found_limits(self) -> dict[str, Any]:
        if self._limits is None:
            return {}
        limits, rows = self._limits
        words = describe_limits(limits, self.args, self.method, rows=rows, num_units=self._num_units)
        return {"clipped": limits.clipped, "limits": words}

    # ---- What is tried ----

    def _try_step(self) -> StepTrial:
        """Return what a step takes, by a trial on public rows."""
        # One place of a public shape is for a copy.
        rows, told = self._list_timed_rows(self._train_batch_size - self._collator.has_fixed_shapes)
        reading, rows = self._time_reading(rows)
        losses = self._estimate.losses
        started = time.perf_counter()
        batch = losses.build_public_batch(rows)
        collating = (time.perf_counter() - started) / len(batch.micro_batches)
        batch = replace(batch, micro_batches=batch.micro_batches[:1])
        capacity = len(batch.micro_batches[0].rows)
        points = self._points_per_pass
        with self._state.held_still():
            times = time_stops(
                self._build_descent(),
                self._estimate,
                batch,
                lambda stop, part: self._evaluate_stop(stop, self.model_wrapped, part),
                points_per_pass=points,
                device=self.args.device,
            )
        shared = losses.shared
        kept = self._count_kept_bytes(shared)
        passes = self.method.estimator.forward_passes
        num_rows = self._units.public_facts["rows"] or self._num_units * self._units.max_rows_per_unit
        drawn = self.args.resolve_batch_size(self._num_units) * self._units.max_rows_per_unit
        if shared is not None and shared.rows is not None:  # It reads a row when a step first draws it.
            reading, rate = times.keeping / capacity, self.args.sampling_rate(self._num_units)
            num_rows = expected_drawn_rows(num_rows, sampling_rate=rate, steps=self.budget.planned_steps)
        return StepTrial(
            rows=told,
            times=times,
            stops=-(-passes // (points or 1)),
            points_per_stop=points or 1,
            num_directions=self.method.estimator.num_directions,
            micro_batches=-(-drawn // capacity),
            walks_apart=shared is not None and is_copied(self.model, self._build_descent().optimizer.parameters()),
            collating=0.0 if self._table is not None else collating,
            reading=reading * num_rows,
            model_bytes=count_model_bytes(self.model),
            kept_bytes=kept,
            processes=self._processes.size,
        )

    def _list_timed_rows(self, count: int) -> tuple[Rows, str]:
        """Return `count` rows to time, and what they are: public ones of middling length, or made-up ones."""
        public = sorted(self._list_collated_rows(SEEN_AMONG), key=count_tokens)
        if public:
            middle = max(0, (len(public) - count) // 2)
            rows = public[middle : middle + count]
            return [*islice(cycle(rows), count)], f"public rows of {_describe_length(rows[len(rows) // 2])}"
        length = max([self.longest_row, *(self.args.padded_lengths or ())]) or max(PROBE_LENGTHS)
        kept = self._find_collated_columns(self.train_dataset)
        alike = {"kept_columns": kept, "ending": self.row_ending}
        rows = generate_rows(self.train_dataset, self.model, count=count, length=length, **alike)
        return rows, f"made-up rows of {_describe_length(rows[0])}"

    def _time_reading(self, rows: Rows) -> tuple[float, Sequence[Any]]:
        """Return the seconds for each row in which its features are computed, and rows of them to evaluate."""
        if self._table is None:
            return 0.0, rows
        self._read_public(self.model_wrapped, rows)  # What is the same for all rows is computed once.
        started = time.perf_counter()
        read = self._read_public(self.model_wrapped, rows)
        seconds = (time.perf_counter() - started) / len(rows)
        return seconds, [*islice(cycle(read), self._estimate.losses.collator.micro_batch_size)]

    def _count_kept_bytes(self, shared: SharedWork | None) -> int:
        table = 0 if self._table is None else sum(column.nbytes for column in self._table.columns.values())
        return table + (0 if shared is None or shared.rows is None else shared.rows.store.room)


def _describe_length(row: Mapping[str, Any]) -> str:
    """Return how many tokens a row has, and how many of them are learned where that is not all.

    >>> _describe_length({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]})
    '3 tokens, of which 1 is learned'
    >>> _describe_length({"input_ids": [5, 6, 7], "labels": 1})
    '3 tokens'
    """
    tokens, labels = count_tokens(row), row.get("labels")
    learned = sum(int(label) != IGNORE_INDEX for label in labels) if isinstance(labels, list) else tokens
    if not isinstance(labels, list) or len(labels) != tokens or learned == tokens:
        return f"{tokens} tokens"
    return f"{tokens} tokens, of which {learned} {'is' if learned == 1 else 'are'} learned"


def _describe_error(error: Exception) -> str:
    return f"the time of a step: trying one failed ({type(error).__name__})"
