"""A run that was stopped anywhere goes on from its log, and ends as if nothing had happened."""

import copy
import functools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PromptEncoderConfig, TaskType, get_peft_model
from transformers import DataCollatorWithPadding, LlamaForSequenceClassification, TrainerCallback

from hf_dpzo import ZOTrainer
from hf_dpzo.privacy.mechanism import IntegerSum, PlainMean, Release
from hf_dpzo.trajectory.checkpoints import MARK_FILE as MARK
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import INITIAL_FILE as INITIAL
from hf_dpzo.trajectory.log import LOG_FILE as LOG
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.replay import rebuild_model, replay_onto, replay_records
from hf_dpzo.trajectory.run_log import RunLog
from hf_dpzo.trajectory.writer import TrajectoryWriter
from hf_dpzo.zo.optimizer import ZOOptimizer

from support.method_cases import CASES, PRIVATE
from support.models import causal_lm, one_layer, with_lora
from support.rows import few_public_rows, labelled_rows
from support.sweeps import sweep


ROWS, STEPS = 10, 6


class Killed(BaseException):
    """What nothing in the library catches."""


def raises_at(count: int, work, *, after: bool = False):
    """`work`, which is killed when it is called for the `count`-th time: before it did anything, or after."""
    calls = []

    def killed(*args, **keywords):
        calls.append(1)
        if len(calls) == count and not after:
            raise Killed
        result = work(*args, **keywords)
        if len(calls) == count:
            raise Killed
        return result

    return killed


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def make_trainer(make_args, tokenizer, folder):
    def make(name="dpzero", *, lora=True, model=None, where=folder, rows=ROWS, **changes) -> ZOTrainer:
        noise = {} if name in PRIVATE else {"noise_multiplier": "absent", "target_delta": "absent"}
        settings = {
            "output_dir": str(where),
            "max_steps": STEPS,
            "weight_decay": 0.01,
            "expected_batch_size": 4,
            "lr_scheduler_type": "linear",
            "warmup_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        torch.manual_seed(0)  # The same base each time, as a script that loads one has it.
        base = one_layer() if model is None else model
        return ZOTrainer(
            model=with_lora(base) if lora else base,
            args=make_args(**{**settings, **noise, **CASES[name], **changes}),
            train_dataset=labelled_rows(rows),
            eval_dataset=labelled_rows(4, seed=1),
            data_collator=DataCollatorWithPadding(tokenizer),
            probe_rows=few_public_rows(),
        )

    return make


@pytest.fixture
def fixed_releases(monkeypatch):
    """What is released in each step is settled beforehand, so that two runs can be compared."""
    trainers = []

    def release(mechanism, differences, processes, recorded):
        step = len(trainers[-1].budget.ledger)
        integers = tuple((-1) ** (step + k) * (step + k + 1) * 2**38 for k in range(differences.shape[1]))
        recorded(integers)
        return Release(integers=integers, unit=mechanism.unit)

    for kind in (IntegerSum, PlainMean):
        monkeypatch.setattr(kind, "release", release)

    def run(trainer, **options):
        trainers.append(trainer)
        return trainer.train(**options)

    return run


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def released(folder: Path) -> tuple:
    """Return what a log holds but for where parts begin, as isolation is measured anew wherever a run goes on."""
    log = Trajectory.read(folder)
    return log.header, [replace(record, begins_part=False) for record in log.records]


def assert_equal(one: dict, other: dict) -> None:
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def ends() -> dict:
    """How runs end that nothing stopped, by what they are."""
    return {}


@pytest.fixture
def whole(ends, fixed_releases, make_trainer, tmp_path):
    """How a run ends that nothing stops: weights, log and what it claims. Each is run once for all tests."""

    def run(name="dpzero", *, lora=True) -> tuple[dict, tuple, tuple]:
        if (name, lora) not in ends:
            trainer = make_trainer(name, lora=lora, where=tmp_path / "whole", save_strategy="no")
            fixed_releases(trainer)
            log = released(tmp_path / "whole")
            ends[name, lora] = weights(trainer.model), log, trainer.budget.claimed_releases
        return ends[name, lora]

    return run


PLACES = {
    "before the append": (TrajectoryWriter, "append", False),
    "after the append": (TrajectoryWriter, "append", True),
    "inside the update": (ZOOptimizer, "_apply_weight_decay_", True),
    "after the update": (ZOOptimizer, "step", True),
    "inside a checkpoint": (ZOTrainer, "_save_rng_state", False),
    "at a checkpoint's mark": (RunLog, "mark_checkpoint", False),
}


def killed_and_resumed(run, make_trainer, monkeypatch, name, place, count, **settings):
    """Run until it is killed in that place, and go on in a new trainer, as a new process would."""
    kind, method, after = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(kind, method, raises_at(count, getattr(kind, method), after=after))
        with pytest.raises(Killed):
            run(make_trainer(name, **settings))
    resumed = make_trainer(name, **settings)
    run(resumed, resume_from_checkpoint=True)
    return resumed


@sweep(name=CASES, lora=[True, False])
def test_killed_run_ends_as_if_nothing_had_happened(
    name, lora, whole, fixed_releases, make_trainer, monkeypatch, folder
):
    """Schedule, stages, anchors, masks, moments: after a kill in step 5 all of them are what they were."""
    end, log, _ = whole(name, lora=lora)
    settings = {"lora": lora, "save_steps": 4}
    resumed = killed_and_resumed(fixed_releases, make_trainer, monkeypatch, name, "inside the update", 5, **settings)
    assert_equal(end, weights(resumed.model))
    assert len(resumed.budget.ledger) == resumed.state.global_step == STEPS
    assert released(folder) == log


@sweep(place=PLACES, count=[1, 2, 3])
def test_killed_anywhere_nothing_is_lost_or_counted_twice(
    place, count, whole, fixed_releases, make_trainer, monkeypatch, folder
):
    end, _, claimed = whole()
    resumed = killed_and_resumed(fixed_releases, make_trainer, monkeypatch, "dpzero", place, count)
    assert_equal(end, weights(resumed.model))
    assert len(resumed.budget.ledger) == STEPS
    assert len(Trajectory.read(folder).records) == STEPS
    assert resumed.budget.claimed_releases == claimed


def test_noise_and_batches_are_fresh_after_resuming(make_trainer, monkeypatch, folder):
    ends = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(ZOOptimizer, "step", raises_at(3, ZOOptimizer.step))
            with pytest.raises(Killed):
                make_trainer().train()
        make_trainer().train(resume_from_checkpoint=True)
        ends.append([record.integers for record in Trajectory.read(folder).records])
        os.rename(folder, f"{folder}-{len(ends)}")
    assert len({integers for end in ends for integers in end}) == 2 * STEPS


def test_resuming_twice_from_one_log_releases_different_noise(make_trainer, monkeypatch, folder, tmp_path):
    """A state that was restored would give the same."""
    with monkeypatch.context() as patch:
        patch.setattr(ZOOptimizer, "step", raises_at(3, ZOOptimizer.step))
        with pytest.raises(Killed):
            make_trainer().train()
    kept, ends = (folder / LOG).read_bytes(), []
    for _ in range(2):
        (folder / LOG).write_bytes(kept)
        make_trainer().train(resume_from_checkpoint=True)
        ends.append([record.integers for record in Trajectory.read(folder).records])
        for checkpoint in folder.glob("checkpoint-*"):
            (checkpoint / MARK).unlink(missing_ok=True)
    assert ends[0][:3] == ends[1][:3]
    assert not set(ends[0][3:]) & set(ends[1][3:])


def watched(seen: list[int], descent, records) -> None:
    seen.extend(record.step for record in records)
    replay_records(descent, records)


def test_checkpoint_is_where_the_replay_starts(make_trainer, monkeypatch):
    """A plain run takes only the tail of the log again; one with moments takes all of it."""
    for name, expected in (("dpzero", [4]), ("mezo-adam", [0, 1, 2, 3, 4])):
        where = make_trainer(name).args.output_dir + name
        with monkeypatch.context() as patch:
            patch.setattr(ZOOptimizer, "step", raises_at(5, ZOOptimizer.step))
            with pytest.raises(Killed):
                make_trainer(name, where=where).train()
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr("hf_dpzo.trajectory.run_log.replay_records", functools.partial(watched, seen))
            make_trainer(name, where=where).train(resume_from_checkpoint=True)
        assert seen == expected


@pytest.mark.parametrize("path", ["True", "folder", "newest", "older"])
def test_what_to_resume_from_is_named_as_in_the_trainer(path, fixed_releases, make_trainer, monkeypatch, folder):
    with monkeypatch.context() as patch:
        patch.setattr(ZOOptimizer, "step", raises_at(6, ZOOptimizer.step))
        with pytest.raises(Killed):
            fixed_releases(make_trainer())
    paths = {"True": True, "folder": str(folder), "newest": f"{folder}/checkpoint-4", "older": f"{folder}/checkpoint-2"}
    resumed = make_trainer()
    fixed_releases(resumed, resume_from_checkpoint=paths[path])
    assert len(Trajectory.read(folder).records) == resumed.state.global_step == STEPS


def test_a_complete_run_is_resumed_without_a_step(make_trainer, folder):
    first = make_trainer()
    first.train()
    again = make_trainer()
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(first.model), weights(again.model))
    assert len(again.budget.ledger) == again.state.global_step == STEPS


def test_an_interrupted_trainer_can_go_on_by_itself(make_trainer, monkeypatch):
    """As in a notebook."""
    trainer = make_trainer()
    with monkeypatch.context() as patch:
        patch.setattr(ZOOptimizer, "_apply_weight_decay_", raises_at(4, ZOOptimizer._apply_weight_decay_, after=True))
        with pytest.raises(Killed):
            trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert len(trainer.budget.ledger) == STEPS


@pytest.mark.parametrize("update", ["sgd", "adam", "momentum"])
def test_an_interrupted_trainer_goes_on_to_where_its_log_leads(update, make_trainer, monkeypatch, folder):
    """Moments and schedule of the first attempt are forgotten, and follow from the log."""
    trainer = make_trainer(update=update, weight_decay=0.0)
    fresh = copy.deepcopy(trainer.model)
    with monkeypatch.context() as patch:
        patch.setattr(ZOOptimizer, "step", raises_at(4, ZOOptimizer.step, after=True))
        with pytest.raises(Killed):
            trainer.train()
    trainer.train(resume_from_checkpoint=True)
    replay_onto(fresh, Trajectory.read(folder))
    assert_equal(weights(trainer.model), weights(fresh))


def with_fresh_head(base_folder: Path, *, lora: bool) -> torch.nn.Module:
    """As scripts make it that seed nothing: the head is new each time, and so is the adapter."""
    torch.seed()
    base = LlamaForSequenceClassification.from_pretrained(base_folder)
    torch.nn.init.normal_(base.score.weight)
    return with_lora(base) if lora else base


@pytest.mark.parametrize("checkpoints", ["no", "steps"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_random_adapters_and_heads_are_kept_beside_the_log(
    lora, checkpoints, make_trainer, tmp_path, folder, monkeypatch, fixed_releases
):
    """A script that seeds none of them goes on with those that the run began with; PEFT keeps the head twice."""
    one_layer().save_pretrained(tmp_path / "base")
    ends = []
    with monkeypatch.context() as patch:
        patch.setattr(ZOOptimizer, "step", raises_at(3, ZOOptimizer.step, after=True))
        killed = make_trainer(
            model=with_fresh_head(tmp_path / "base", lora=lora), lora=False, save_strategy=checkpoints
        )
        with pytest.raises(Killed):
            fixed_releases(killed)
    at_the_kill = weights(killed.model)
    seen = RunLog.catch_up
    monkeypatch.setattr(
        RunLog,
        "catch_up",
        lambda log, descent, *given, **named: (
            seen(log, descent, *given, **named) or ends.append(weights(descent.model))
        ),
    )
    again = make_trainer(model=with_fresh_head(tmp_path / "base", lora=lora), lora=False, save_strategy=checkpoints)
    fixed_releases(again, resume_from_checkpoint=True)
    assert (folder / INITIAL).is_file()
    assert_equal(at_the_kill, ends[0])
    rebuilt = rebuild_model(str(tmp_path / "base"), folder)
    assert_equal(weights(again.model), weights(rebuilt))


def test_prompt_tuning_resumes_though_its_checkpoints_lack_its_encoder(make_args, tokenizer, folder, monkeypatch):
    def make():
        torch.manual_seed(0)
        model = causal_lm()
        torch.manual_seed(len(list(folder.glob("*"))))  # Another initialization each time.
        config = PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2, encoder_hidden_size=8)
        plan = {"max_steps": STEPS, "expected_batch_size": 4}
        args = make_args(output_dir=str(folder), save_strategy="steps", save_steps=2, **plan)
        rows = labelled_rows(ROWS).remove_columns("labels")
        return ZOTrainer(
            model=get_peft_model(model, config),
            args=args,
            train_dataset=rows.add_column("labels", rows["input_ids"][:]).select(range(ROWS)),
            data_collator=lambda some: (
                tokenizer.pad([{"input_ids": [5, 6, 7]} for _ in some], return_tensors="pt")
                | {"labels": torch.tensor([[5, 6, 7] for _ in some])}
            ),
        )

    with monkeypatch.context() as patch:
        patch.setattr(ZOOptimizer, "step", raises_at(3, ZOOptimizer.step))
        killed = make()
        with pytest.raises(Killed):
            killed.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.budget.ledger) == STEPS


# ---- What may not be resumed ----


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A place for folders that several tests begin with."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def stopped(make_trainer, monkeypatch, folder, kept):
    """Put into `folder` what a run leaves that was killed in its fourth step. It is run once for all tests."""

    def stop(**settings) -> None:
        left = kept / f"stopped {settings}"
        if not left.exists():
            with monkeypatch.context() as patch:
                patch.setattr(ZOOptimizer, "step", raises_at(4, ZOOptimizer.step))
                with pytest.raises(Killed):
                    make_trainer(where=left, **settings).train()
        shutil.copytree(left, folder)

    return stop


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clip_norm": 0.5}, "method.clip_norm=1.0 there and 0.5 here"),
        ({"noise_multiplier": 2.0}, "method.noise_multiplier=1.0 there and 2.0 here"),
        ({"rows": ROWS + 1}, "rows.units=10 there and 11 here"),
        ({"per_device_train_batch_size": 1}, "(per_device_train_batch_size == 1)=false there and true here"),
        ({"padded_lengths": [16]}, "rows.padded_lengths=null there and [16] here"),
        ({"max_steps": 7}, "plan.steps=6 there and 7 here"),
        ({"seed": 7}, "directions.seed=42 there and 7 here"),
        ({"name": "dpzo"}, 'method.name="dpzero" there and "dpzo" here'),
        ({"update": "momentum"}, 'update.name="sgd" there and "momentum" here'),
        ({"weight_decay": 0.5}, "groups="),
        ({"learning_rate": 0.5}, "learning_rate=0.5 in step 1: the log has 0.01"),
        ({"lr_scheduler_type": "constant"}, "in step 0: the log has"),
        ({"target_delta": 1e-3}, "plan.delta=0.0001 there and 0.001 here"),
    ],
)
def test_a_log_of_another_run_is_refused_with_what_differs(settings, said, make_trainer, stopped, folder):
    stopped()
    before = (folder / LOG).read_bytes()
    trainer = make_trainer(**settings)
    with pytest.raises(TrajectoryError) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert said in str(caught.value)
    assert (folder / LOG).read_bytes() == before


def test_another_model_is_refused(make_trainer, stopped, folder):
    stopped()
    torch.manual_seed(5)
    other = one_layer()
    with pytest.raises(TrajectoryError, match=r"base\.frozen="):
        make_trainer(model=other).train(resume_from_checkpoint=True)
    with pytest.raises(TrajectoryError, match="it has not the parameters that the log trains"):
        make_trainer(lora=False).train(resume_from_checkpoint=True)


def test_other_initial_weights_are_refused(make_trainer, stopped):
    stopped(lora=False, save_strategy="no")
    changed = one_layer()
    changed.model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(TrajectoryError, match=r"trained\.initial="):
        make_trainer(lora=False, save_strategy="no", model=changed).train(resume_from_checkpoint=True)


def test_a_log_is_not_overwritten(make_trainer, stopped, folder):
    stopped()
    before = (folder / LOG).read_bytes()
    with pytest.raises(TrajectoryError, match="it holds the log of a run; go on with that by resume_from_checkpoint"):
        make_trainer().train()
    assert (folder / LOG).read_bytes() == before


def test_without_a_run_there_is_nothing_to_resume(make_trainer):
    with pytest.raises(TrajectoryError, match="holds no log of a run; leave it out to start one"):
        make_trainer().train(resume_from_checkpoint=True)


def test_checkpoint_without_its_log_is_refused(make_trainer, stopped, folder):
    """What the steps after it spent is not known."""
    stopped()
    (folder / LOG).unlink()
    with pytest.raises(TrajectoryError, match="holds no log of a run; leave it out to start one"):
        make_trainer().train(resume_from_checkpoint=f"{folder}/checkpoint-2")


def test_log_that_was_cut_behind_a_checkpoint_is_refused(make_trainer, stopped, folder):
    stopped()
    log = Trajectory.read(folder)
    data = (folder / LOG).read_bytes()
    (folder / LOG).write_bytes(data[: len(data) - 3 * log.layout.record_size])
    with pytest.raises(TrajectoryError, match="does not hold the 2 steps of this checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)


def test_unfinished_checkpoints_are_passed_over(make_trainer, stopped, folder):
    stopped()
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_text("half")
    with pytest.raises(TrajectoryError, match="it was never finished"):
        make_trainer().train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.budget.ledger) == STEPS


def test_checkpoint_whose_weights_were_changed_is_refused(make_trainer, stopped, folder):
    stopped()
    make_trainer(where=folder.parent / "other").model.save_pretrained(folder / "checkpoint-2")
    with pytest.raises(TrajectoryError, match="its weights are not those that were saved; delete this folder"):
        make_trainer().train(resume_from_checkpoint=True)


def test_checkpoints_of_elsewhere_are_refused(make_trainer, stopped, folder, tmp_path):
    stopped()
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(TrajectoryError, match="it is neither True nor a checkpoint in output_dir="):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "elsewhere"))


def test_schedules_that_look_at_evaluations_are_not_resumed(make_trainer, stopped):
    settings = {
        "eval_data_is_public": True,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "warmup_steps": 0,
    }
    stopped(**settings)
    with pytest.raises(ValueError, match="it depends on evaluations, which a log does not hold"):
        make_trainer(**settings).train(resume_from_checkpoint=True)


def test_two_new_runs_do_not_share_a_folder(make_trainer, monkeypatch, folder):
    """The second finds the first's lock before there is a log, and leaves everything as it is."""
    first, second = make_trainer(), make_trainer()
    measure = ZOTrainer._measure_isolation

    def meanwhile(trainer, *given):
        with pytest.raises(TrajectoryError, match="another process writes this log"):
            second.train()
        return measure(trainer, *given)

    monkeypatch.setattr(ZOTrainer, "_measure_isolation", meanwhile)
    first.train()
    assert len(Trajectory.read(folder).records) == len(first.budget.ledger) == STEPS
    assert len(second.budget.ledger) == 0


def test_nothing_changes_a_log_while_a_run_resumes_from_it(make_trainer, stopped, monkeypatch, folder):
    stopped()
    first, second = make_trainer(), make_trainer()
    measure = ZOTrainer._measure_isolation

    def meanwhile(trainer, *given):
        with pytest.raises(TrajectoryError, match="another process writes this log"):
            second.train(resume_from_checkpoint=True)
        return measure(trainer, *given)

    monkeypatch.setattr(ZOTrainer, "_measure_isolation", meanwhile)
    first.train(resume_from_checkpoint=True)
    assert len(Trajectory.read(folder).records) == STEPS


def test_a_model_of_a_resumed_run_is_not_trained_by_another(make_trainer, stopped, tmp_path):
    stopped()
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    other = make_trainer(where=tmp_path / "other", model=resumed.model, lora=False)
    with pytest.raises(ValueError, match="another run has trained it"):
        other.train()


def test_a_run_that_could_not_begin_spends_nothing(make_trainer, monkeypatch):
    trainer, measure = make_trainer(), ZOTrainer._measure_isolation
    with monkeypatch.context() as patch:
        patch.setattr(ZOTrainer, "_measure_isolation", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    assert measure is ZOTrainer._measure_isolation
    trainer.train()
    assert len(trainer.budget.ledger) == STEPS


def test_learning_rates_that_the_log_does_not_have_stop_the_run(make_trainer):
    class Meddler(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= 2

    trainer = make_trainer(warmup_steps=0)
    trainer.add_callback(Meddler())
    with pytest.raises(RuntimeError, match="step=0: the learning rate changed between its release and its update"):
        trainer.train()


# ---- Torn records ----


@pytest.mark.parametrize("lost", [1, 20, 63])
def test_torn_record_is_a_step_that_is_spent(lost, make_trainer, stopped, folder):
    """Somebody may have seen what was released. The step is taken with nothing, and none is taken in its place."""
    stopped()
    data = (folder / LOG).read_bytes()
    (folder / LOG).write_bytes(data[:-lost])
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    log = Trajectory.read(folder)
    assert [record.void for record in log.records] == [False] * 3 + [True] + [False] * 2
    assert log.records[3].integers == (0,)
    assert len(resumed.budget.ledger) == resumed.state.global_step == STEPS
    again = make_trainer(where=folder.parent / "none")
    replay_onto(again.model, log)
    assert_equal(weights(again.model), weights(resumed.model))


def test_zeros_in_place_of_the_last_record_are_torn_too(make_trainer, stopped, folder):
    """As a file system may leave them when the power goes."""
    stopped()
    data = (folder / LOG).read_bytes()
    (folder / LOG).write_bytes(data[:-64] + bytes(64))
    make_trainer().train(resume_from_checkpoint=True)
    assert [record.void for record in Trajectory.read(folder).records].index(True) == 3


# ---- Rebuilding ----


def test_any_step_is_rebuilt_from_base_and_log(make_trainer, tmp_path, folder):
    torch.manual_seed(0)
    one_layer().save_pretrained(tmp_path / "base")
    for lora in (True, False):
        where = tmp_path / f"run-{lora}"
        base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
        trainer = make_trainer(lora=lora, model=base, where=where)
        trainer.train()
        for step in (2, 4, None):
            rebuilt = rebuild_model(str(tmp_path / "base"), where, at_step=step)
            rebuilt.save_pretrained(tmp_path / "again")
            name = "adapter_model.safetensors" if lora else "model.safetensors"
            checkpoint = where / f"checkpoint-{step or STEPS}"
            assert (tmp_path / "again" / name).read_bytes() == (checkpoint / name).read_bytes()
