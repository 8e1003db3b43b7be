"""Searches for hyperparameters: every trial is a run of its own, and each card counts all of them."""

import inspect
import json
from pathlib import Path

import dp_accounting
import optuna
import pytest
from dp_accounting.pld import PLDAccountant
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    hyperparameter_search,
)
from transformers.integrations.integration_utils import run_hp_search_optuna

from hf_dpzo import ZOTrainer, ZOTrainingArguments
from hf_dpzo.data_ledger.data_ledger import DataLedger
from hf_dpzo.plots import _compute_epsilons
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.ledger import BudgetExceededError
from hf_dpzo.privacy.rounding import round_up
from hf_dpzo.trainer.callbacks import FirstStepGuard
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.verification.verify import verify

from support.models import one_layer, with_lora
from support.rows import few_public_rows, labelled_rows
from support.runs import SHORT_RUN


RATES = [1e-3, 1e-2, 1e-1]
TRIALS, STEPS, ROWS = len(RATES), 2, 40
SETTINGS = {
    **SHORT_RUN,
    "max_steps": STEPS,
    "trials": TRIALS,
    "eval_data_is_public": True,
    "save_strategy": "no",
    "logging_steps": 1,
}


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    one_layer().save_pretrained(folder)
    return folder


def trainer_in(folder, base, tokenizer, *, parts=None, **changes) -> ZOTrainer:
    settings = {**SETTINGS, "output_dir": str(folder), **changes}
    given = {
        "model_init": lambda: AutoModelForSequenceClassification.from_pretrained(base),
        "args": ZOTrainingArguments(**{name: value for name, value in settings.items() if value != "absent"}),
        "train_dataset": labelled_rows(ROWS),
        "eval_dataset": labelled_rows(8, seed=1),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "probe_rows": few_public_rows(),
    }
    return ZOTrainer(**{**given, **(parts or {})})


@pytest.fixture
def make_trainer(tmp_path, base, tokenizer):
    def make(**changes) -> ZOTrainer:
        return trainer_in(tmp_path / "search", base, tokenizer, **changes)

    return make


def rates(trial) -> dict[str, float]:
    return {"learning_rate": trial.suggest_categorical("learning_rate", RATES)}


def search(trainer, hp_space=rates, **options):
    given = {"n_trials": TRIALS, "sampler": optuna.samplers.GridSampler({"learning_rate": RATES}), **options}
    return trainer.hyperparameter_search(hp_space, **given)


def by_number(of):
    """A space in which the trial of each number has the values that `of` gives it."""
    return lambda trial: of[trial.number]


def said_in(folder) -> dict:
    return json.loads((Path(folder) / "privacy.json").read_text())


@pytest.fixture(scope="module")
def searched(tmp_path_factory, base, tokenizer):
    """A search that has ended: its trainer, what it returned, and the folders of its trials."""
    folder = tmp_path_factory.mktemp("searched")
    trainer = trainer_in(folder, base, tokenizer)
    return trainer, search(trainer), [folder / f"run-{number}" for number in range(TRIALS)]


# ---- What is claimed ----


def test_every_card_claims_what_all_trials_released(searched):
    event = dp_accounting.PoissonSampledDpEvent(8 / ROWS, dp_accounting.GaussianDpEvent(1.0))
    all_trials = PLDAccountant().compose(dp_accounting.SelfComposedDpEvent(event, TRIALS * STEPS))
    for folder in searched[2]:
        claim = said_in(folder)["claim"]
        assert claim["epsilon"] == pytest.approx(all_trials.get_epsilon(1e-4), rel=1e-2)
        assert (claim["trials"], claim["steps_taken"], claim["steps_claimed"]) == (TRIALS, STEPS, TRIALS * STEPS)
        assert [one["count"] for one in said_in(folder)["accounting"]["ledger"]] == [TRIALS * STEPS]


def test_cards_say_that_a_run_is_one_of_several(searched):
    text = (searched[2][0] / "README.md").read_text()
    assert "This is one of 3 runs on the same rows. The guarantee covers what all of them released together" in text
    assert "| steps | 2 taken, 6 claimed: those of 3 runs of 2 |" in text
    assert "planned steps had been released" not in text
    assert "other runs on the same rows: a card counts the 3 runs that it is one of;" in text
    assert "3 runs are accounted, and whether there were others is not told" in text
    assert "\n\n\n" not in text


def test_logs_and_metrics_show_the_epsilon_of_all_trials(searched):
    trainer = searched[0]
    shown = [log["epsilon"] for log in trainer.state.log_history if "epsilon" in log]
    assert shown[-1] == round_up(trainer.budget.guarantee().epsilon) == said_in(searched[2][-1])["claim"]["epsilon"]


def test_the_picture_begins_with_what_the_other_trials_cost(searched):
    said = said_in(searched[2][0])
    steps, epsilons = _compute_epsilons(said)
    assert steps == [0, 1, 2]
    assert epsilons[0] == account(((searched[0].budget.query, 2 * STEPS),), delta=1e-4).epsilon
    assert round_up(epsilons[-1]) == said["claim"]["epsilon"]


def test_what_a_trial_leaves_is_verified_by_its_log_alone(searched, base):
    for folder in searched[2]:
        assert all(finding.holds for finding in verify(folder, base=base))


def test_a_trial_that_passes_for_a_run_alone_is_caught(searched, tmp_path):
    folder = tmp_path / "edited"
    folder.mkdir()
    for path in searched[2][0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    said = said_in(folder)
    del said["claim"]["trials"]
    (folder / "privacy.json").write_text(json.dumps(said))
    wrong = [finding for finding in verify(folder, weights=False) if not finding.holds]
    assert any("claim.trials=null there and 3 here" in finding.detail for finding in wrong)


# ---- What is left ----


def test_each_trial_is_a_run_with_a_folder_and_a_log_of_its_own(searched):
    trainer, _, folders = searched
    logs = [Trajectory.read(folder) for folder in folders]
    assert sorted(log.records[0].learning_rates[0] for log in logs) == RATES
    assert [len(log.records) for log in logs] == [STEPS] * TRIALS
    assert all(log.header["plan"]["trials"] == TRIALS for log in logs)
    assert len({log.header["trained"]["initial"] for log in logs}) == 1  # Each began at the same new model.
    assert sorted(path.name for path in Path(trainer.args.output_dir).iterdir()) == [one.name for one in folders]


def test_the_best_run_is_the_one_in_the_folder_of_its_number(searched):
    _, best, folders = searched
    losses = [said_in(folder)["evaluation"]["metrics"]["eval_loss"] for folder in folders]
    assert best.objective == min(losses) == losses[int(best.run_id)]
    log = Trajectory.read(folders[int(best.run_id)])
    assert log.records[0].learning_rates[0] == best.hyperparameters["learning_rate"]


def test_arguments_are_after_a_search_what_they_were_before(searched):
    trainer, _, folders = searched
    assert trainer.args.learning_rate == SETTINGS["learning_rate"]
    assert Path(trainer.args.output_dir) == folders[0].parent


def test_checkpoints_of_a_trial_lie_in_its_folder(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, trials=1)
    search(trainer, n_trials=1)
    folder = Path(trainer.args.output_dir) / "run-0"
    for number in (1, 2):
        assert {"README.md", "model.safetensors", "trajectory.zo"} <= {
            path.name for path in (folder / f"checkpoint-{number}").iterdir()
        }
    assert said_in(folder)["evaluation"]["after_step"] == STEPS


def test_smoothing_and_seeds_are_free(make_trainer):
    trainer = make_trainer(trials=2)
    search(trainer, by_number([{"smoothing": 1e-2, "seed": 5}, {"learning_rate": 1.0}]), n_trials=2)
    first, second = (Trajectory.read(f"{trainer.args.output_dir}/run-{number}") for number in range(2))
    assert (first.header["method"]["smoothing"], first.header["directions"]["seed"]) == (1e-2, 5)
    # What one trial sets, the next one does not inherit.
    assert (second.header["method"]["smoothing"], second.header["directions"]["seed"]) == (1e-3, 42)


@pytest.mark.parametrize("method", [{"method": "aggzo"}, {"method": "zoso", "num_stages": 1}])
def test_directions_are_free_for_their_noise_grows_with_them_or_need_not(make_trainer, method):
    trainer = make_trainer(trials=2, num_directions=2, **method)
    search(trainer, by_number([{}, {"num_directions": 3}]), n_trials=2)
    first, second = (said_in(f"{trainer.args.output_dir}/run-{number}") for number in range(2))
    assert [said["mechanism"]["num_directions"] for said in (first, second)] == [2, 3]
    assert first["claim"] == second["claim"]


def test_the_seed_of_a_trial_makes_its_model(make_trainer):
    trainer = make_trainer(parts={"model_init": lambda: one_layer()})
    search(trainer, by_number([{"seed": 5}, {"seed": 6}, {"seed": 5}]))
    logs = [Trajectory.read(f"{trainer.args.output_dir}/run-{number}") for number in range(TRIALS)]
    first, second, third = (log.header["trained"]["initial"] for log in logs)
    assert first == third != second


def test_each_trial_is_guarded_with_its_own_smoothing(make_trainer):
    trainer = make_trainer(trials=2)
    search(trainer, by_number([{"smoothing": 1e-2}, {"smoothing": 5e-2}]), n_trials=2)
    guards = [one for one in trainer.callback_handler.callbacks if isinstance(one, FirstStepGuard)]
    assert [guard._smoothing for guard in guards] == [5e-2]


def test_adapters_are_searched_too(make_trainer, tokenizer):
    parts = {"model_init": lambda: with_lora(one_layer())}
    trainer = make_trainer(parts=parts, trials=2)
    search(trainer, n_trials=2)
    assert [said_in(f"{trainer.args.output_dir}/run-{n}")["claim"]["trials"] for n in range(2)] == [2, 2]


def test_a_killed_trial_goes_on_by_hand(make_trainer, tmp_path):
    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(parts={"callbacks": [Killed()]})
    with pytest.raises(KeyboardInterrupt):
        search(trainer, by_number([{"learning_rate": 0.1}]))
    folder = str(tmp_path / "search" / "run-0")
    again = make_trainer(output_dir=folder, learning_rate=0.1, trials="absent")
    with pytest.raises(TrajectoryError, match=r"plan\.trials=3 there and null here"):
        again.train(resume_from_checkpoint=True)
    again = make_trainer(output_dir=folder, learning_rate=0.1)
    again.train(resume_from_checkpoint=True)
    again.save_model()
    claim = said_in(folder)["claim"]
    assert (claim["steps_taken"], claim["steps_claimed"], claim["trials"]) == (STEPS, TRIALS * STEPS, TRIALS)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"n_trials": 4}, "n_trials=4: the guarantee covers trials=3; set that to as many"),
        ({}, {"n_trials": None}, "n_trials=None: the guarantee covers"),
        ({"trials": "absent"}, {}, "n_trials=3: the guarantee covers trials=1"),
        ({}, {"backend": "ray"}, "backend=ray: its trials are made elsewhere"),
        ({}, {"n_jobs": 2}, "n_jobs=2: a trainer makes one trial after the other"),
        ({"eval_data_is_public": False}, {}, "eval_data_is_public=False: a search lets the evaluation data choose"),
        ({"parts": {"eval_dataset": None}}, {}, "eval_dataset=None: trials are compared by it"),
        ({"parts": {"train_dataset": None}}, {}, "train_dataset=None: a search needs rows"),
    ],
)
def test_a_search_that_could_not_be_counted_is_refused_before_anything_is_touched(
    make_trainer, tmp_path, monkeypatch, changes, options, message
):
    trainer = make_trainer(**changes)
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("too far"))
    with pytest.raises(ValueError, match=message) as caught:
        search(trainer, **options)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "search").iterdir()) == []


def test_pushing_every_trial_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.args.push_to_hub = True
    with pytest.raises(ValueError, match="push_to_hub=True: each trial would replace the one before"):
        search(trainer)


def test_several_processes_are_refused(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(ZOTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="processes=2: a trial that fails or is pruned in one"):
        search(trainer)


def test_a_model_that_cannot_be_rebuilt_is_refused_as_stock_does(make_trainer):
    trainer = make_trainer(parts={"model_init": None, "model": one_layer()})
    with pytest.raises(RuntimeError, match="model_init"):
        search(trainer)


CHANGED = [
    {"max_steps": 3},
    {"noise_multiplier": 0.5},
    {"expected_batch_size": 4},
    {"target_delta": 1e-3},
    {"trials": 2},
    {"max_rows_per_unit": 2, "privacy_unit_column": "labels"},
    {"eval_data_is_public": False},
    {"output_dir": "elsewhere"},
    {"paper_noise": True},
]


@pytest.mark.parametrize("values", CHANGED, ids=[next(iter(one)) for one in CHANGED])
def test_a_trial_that_would_release_something_else_is_refused(make_trainer, tmp_path, values):
    trainer = make_trainer()
    name, value = next(iter(values.items()))
    with pytest.raises(ValueError, match=rf"{name}={value}.*: every trial must release what was counted") as caught:
        search(trainer, by_number([{"learning_rate": 0.5, **values}]))
    assert "learning_rate" not in str(caught.value)
    assert list((tmp_path / "search").iterdir()) == []


def test_a_trainer_whose_search_was_refused_can_search_yet(make_trainer):
    trainer = make_trainer()
    for space in ({"max_steps": 3}, {"noise_multiplier": 0.5}):
        with pytest.raises(ValueError, match="every trial must release what was counted"):
            search(trainer, by_number([space]))
    assert (trainer.budget.planned_steps, trainer.method.noise_multiplier) == (STEPS, 1.0)
    search(trainer, n_trials=1)
    assert said_in(f"{trainer.args.output_dir}/run-0")["claim"]["steps_claimed"] == TRIALS * STEPS


def test_values_that_no_run_takes_are_refused(make_trainer):
    with pytest.raises(ValueError, match="smoothing=-1: it must be positive"):
        search(make_trainer(), by_number([{"smoothing": -1}]))


@pytest.mark.parametrize("wrong", ["3", 3.0, True])
def test_a_number_of_trials_that_is_none_is_refused(make_trainer, wrong):
    with pytest.raises(ValueError, match=r"^n_trials=.*: it is no whole number; pass how many trials to make"):
        make_trainer().hyperparameter_search(rates, n_trials=wrong)


@pytest.mark.parametrize("returned", [None, [1e-3]])
def test_a_space_that_sets_nothing_is_refused(make_trainer, returned):
    with pytest.raises(
        ValueError, match=r"^hp_space: it returned (NoneType|list); return a dict of what the trial sets"
    ):
        make_trainer().hyperparameter_search(lambda trial: returned, n_trials=TRIALS)


@pytest.mark.parametrize("where", [".", "mine", "mine/run-0"])
def test_another_run_or_search_in_the_same_folder_is_refused(where, make_trainer, tmp_path):
    """Its trials would be six, and each card would claim three."""
    earlier = tmp_path / "search" / where / "trajectory.zo"
    earlier.parent.mkdir(parents=True, exist_ok=True)
    earlier.write_bytes(b"of another run")
    with pytest.raises(
        ValueError, match=r"^output_dir=.*: it holds 1 logs of other runs, which trials=3 does not count"
    ):
        make_trainer().hyperparameter_search(rates, n_trials=TRIALS)


def test_a_second_search_is_refused(searched):
    with pytest.raises(BudgetExceededError, match="trials=3: a search of this trainer has begun 3 of them"):
        search(searched[0])


def test_training_on_after_a_search_is_refused(searched):
    with pytest.raises(BudgetExceededError, match="make a new trainer, whose run is one more of the trials"):
        searched[0].train()


def test_a_search_after_training_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.train()
    with pytest.raises(BudgetExceededError):
        search(trainer)


def test_no_model_of_a_search_is_saved(searched, tmp_path):
    with pytest.raises(ValueError, match="model: a search keeps none"):
        searched[0].save_model(str(tmp_path))


def test_a_model_that_an_earlier_trial_has_trained_is_refused(make_trainer):
    model = one_layer()
    trainer = make_trainer(parts={"model_init": lambda: model})
    with pytest.raises(ValueError, match="model: another run has trained it"):
        search(trainer)
    assert not (Path(trainer.args.output_dir) / "run-1" / "trajectory.zo").exists()


def test_a_trial_that_no_search_counts_is_refused(make_trainer):
    with pytest.raises(ValueError, match="trial: it is a part of a search; call hyperparameter_search"):
        make_trainer().train(trial={"learning_rate": 1.0})


def test_trials_of_one_name_do_not_overwrite_each_other(make_trainer):
    with pytest.raises(TrajectoryError, match=r"output_dir=.*/same: it holds the log of a run"):
        search(make_trainer(), hp_name=lambda trial: "same")


# ---- What counts as spent ----


class FailsOnce(TrainerCallback):
    failed = False

    def on_step_end(self, args, state, control, **kwargs):
        if not self.failed:
            self.failed = True
            raise RuntimeError("a tracker is down")


def test_a_trial_that_fails_is_spent(make_trainer):
    trainer = make_trainer(parts={"callbacks": [FailsOnce()]})
    search(trainer, catch=(RuntimeError,))
    folders = sorted(path.name for path in Path(trainer.args.output_dir).glob("run-*"))
    assert folders == ["run-0", "run-1", "run-2"]
    assert said_in(f"{trainer.args.output_dir}/run-2")["claim"]["steps_claimed"] == TRIALS * STEPS
    with pytest.raises(BudgetExceededError):
        search(trainer, n_trials=1)


def test_a_search_that_breaks_off_leaves_its_trainer_spent(make_trainer):
    trainer = make_trainer(parts={"callbacks": [FailsOnce()]})
    with pytest.raises(RuntimeError, match="a tracker is down"):
        search(trainer)
    assert trainer.args.learning_rate == SETTINGS["learning_rate"]
    with pytest.raises(BudgetExceededError, match="a search of this trainer has begun 1 of them"):
        search(trainer, n_trials=2)


def test_a_pruned_trial_is_spent(make_trainer):
    class Prune(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    trainer = make_trainer(eval_strategy="steps", eval_steps=1)
    best = search(trainer, pruner=Prune())
    assert best.run_id != "1"
    assert len(Trajectory.read(f"{trainer.args.output_dir}/run-1").records) == 1
    with pytest.raises(BudgetExceededError):
        trainer.train()


def test_trials_of_an_earlier_search_in_a_study_count(make_trainer, tmp_path):
    study = {"storage": optuna.storages.InMemoryStorage(), "study_name": "one", "load_if_exists": True, "sampler": None}
    search(make_trainer(), n_trials=2, **study)
    with pytest.raises(ValueError, match="trial=3: its study has trials of an earlier search, and trials=3 counts"):
        search(make_trainer(output_dir=str(tmp_path / "again")), n_trials=2, **study)


def test_without_noise_trials_are_not_counted(make_trainer):
    trainer = make_trainer(method="mezo", noise_multiplier="absent", target_delta="absent", trials=1)
    search(trainer, by_number([{"max_steps": 1}, {"max_steps": 2}, {}]))
    steps = [len(Trajectory.read(f"{trainer.args.output_dir}/run-{number}").records) for number in range(TRIALS)]
    assert steps == [1, 2, STEPS]
    assert said_in(f"{trainer.args.output_dir}/run-0")["status"] == "NOT_PRIVATE"


def test_no_private_trial_is_chosen_by_trials_without_noise(make_trainer):
    trainer = make_trainer(method="mezo", noise_multiplier="absent", target_delta="absent", trials=1)
    private = {"method": "dpzero", "noise_multiplier": 1.0, "target_delta": 1e-4}
    with pytest.raises(ValueError, match=r"method=dpzero, .*: every trial must release what was counted"):
        search(trainer, by_number([{"max_steps": 1}, private]))


# ---- Hooks of the stock search ----


def test_stock_search_still_asks_for_the_private_hooks():
    trained = inspect.getsource(Trainer.train)
    assert trained.index("self.call_model_init(trial)") < trained.index("self._hp_search_setup(trial)")
    assert trained.index("self._hp_search_setup(trial)") < trained.index("self._inner_training_loop")
    assert "self._get_output_dir(trial=trial)" in inspect.getsource(Trainer._save_checkpoint)
    assert "self._get_output_dir(trial)" in inspect.getsource(Trainer._finalize_training)
    setup = inspect.getsource(Trainer._hp_search_setup)
    assert "setattr(self.args, key, value)" in setup and "self._train_batch_size = self.args.train_batch_size" in setup
    assert "os.path.join(self.args.output_dir, run_name)" in inspect.getsource(Trainer._get_output_dir)
    searched = inspect.getsource(Trainer.hyperparameter_search)
    assert "self.hp_search_backend = backend" in searched and "self.hp_search_backend = None" in searched


def test_stock_search_still_trains_and_then_evaluates_each_trial():
    objective = inspect.getsource(run_hp_search_optuna)
    assert "trainer.train(resume_from_checkpoint=checkpoint, trial=trial)" in objective
    assert objective.index("trainer.train(") < objective.index("metrics = trainer.evaluate()")
    assert "study.optimize(" in objective and "n_trials=n_trials" in objective
    assert hyperparameter_search.OptunaBackend.name == "optuna"


def test_each_trial_is_an_entry_in_the_ledger_of_its_data(make_trainer, tmp_path):
    path = tmp_path / "data.ledger"
    make_trainer(privacy_ledger=str(path)).hyperparameter_search(by_number([{}, {}]), n_trials=2)
    runs = DataLedger(path).read().runs
    assert [Path(run.plan.folder).name for run in runs] == ["run-0", "run-1"]
    assert [run.plan.planned_steps for run in runs] == [STEPS, STEPS]


def test_a_search_whose_trials_would_pass_the_budget_of_their_data_begins_none(make_trainer, tmp_path):
    path = tmp_path / "data.ledger"
    trainer = make_trainer(privacy_ledger=str(path))
    query = trainer.budget.query
    within = account(((query, 2 * STEPS),), delta=1e-4).epsilon
    DataLedger(path, create=True).set_budget(epsilon=within, delta=1e-4)
    with pytest.raises(BudgetExceededError, match="the 3 runs on these data, this one included, would come to"):
        search(trainer)
    assert DataLedger(path).read().runs == ()


def test_no_trial_may_leave_the_ledger(make_trainer, tmp_path):
    trainer = make_trainer(privacy_ledger=str(tmp_path / "data.ledger"))
    with pytest.raises(ValueError, match="privacy_ledger=None: every trial must release what was counted"):
        trainer.hyperparameter_search(by_number([{"privacy_ledger": None}]), n_trials=1)
