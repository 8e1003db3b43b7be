"""Whole runs of tiny models through the real Trainer."""

import inspect
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, TaskType
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from hf_dpzo import Prompt, ZOTrainer
from hf_dpzo.data.sealed import GlobalRandomnessError
from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.ledger import BudgetExceededError
from hf_dpzo.privacy.mechanism import IntegerSum
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian
from hf_dpzo.privacy.rounding import round_up
from hf_dpzo.recipe.tasks.metrics import compute_accuracy
from hf_dpzo.trajectory.run_log import RunLog
from hf_dpzo.zo.optimizer import ZOOptimizer

from support.models import causal_lm, classifier, one_layer, with_lora
from support.rows import labelled_rows


ROWS = 40


@pytest.fixture
def make_trainer(make_args, tokenizer):
    def make(model=None, *, args=None, **parts) -> ZOTrainer:
        given = {
            "model": model or with_lora(one_layer()),
            "args": args or make_args(),
            "train_dataset": labelled_rows(ROWS),
            "eval_dataset": labelled_rows(12, seed=1),
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": compute_accuracy,
            **parts,
        }
        return ZOTrainer(**given)

    return make


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("lora", [True, False])
def test_training_moves_what_is_trainable_and_nothing_else(make_trainer, lora):
    trainer = make_trainer(with_lora(classifier()) if lora else classifier())
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = state(trainer.model)
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_learnable_task_is_learned(make_trainer, make_args):
    """The class is in the first token; 60 steps tell it better than chance, whatever the noise."""
    args = make_args(
        method="aggzo",
        noise_multiplier=0.5,
        max_steps=60,
        expected_batch_size=128,
        per_device_train_batch_size=256,
        num_directions=16,
        learning_rate=0.15,
        logging_steps=50,
    )
    rows = labelled_rows(400)
    trainer = make_trainer(classifier(), args=args, train_dataset=rows, eval_dataset=labelled_rows(200, seed=7))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.97 * before
    assert after["eval_accuracy"] > 0.55


def test_every_step_is_in_the_ledger(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert len(trainer.budget.ledger) == trainer.state.global_step == 4
    assert trainer.budget.guarantee() == account(trainer.budget.ledger.releases, delta=1e-4)


def test_empty_and_large_batches_are_steps_too(make_trainer, monkeypatch):
    sizes = iter([0, ROWS, 0, 1])

    def draw(mask):
        taken = torch.zeros(mask.size, dtype=torch.bool).numpy()
        taken[: next(sizes, 0)] = True
        return taken

    monkeypatch.setattr(BernoulliSampler, "draw", draw)
    trainer = make_trainer()
    before = state(trainer.model)
    trainer.train()
    assert len(trainer.budget.ledger) == 4
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("full", [False, True])
def test_micro_batches_do_not_change_the_result(make_trainer, make_args, monkeypatch, full):
    """Beyond float32 rounding of the losses: the sum itself is exact."""
    ends = []
    for size in (1, 3, 40):
        torch.manual_seed(0)
        monkeypatch.setattr(DiscreteGaussian, "add", lambda self, values: list(values))
        monkeypatch.setattr(BernoulliSampler, "draw", lambda mask: torch.arange(mask.size).numpy() % 3 == 0)
        model = classifier() if full else with_lora(classifier())
        trainer = make_trainer(model, args=make_args(per_device_train_batch_size=size))
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-5)


def test_no_seed_makes_a_run_repeat_itself(make_trainer):
    """Neither the noise nor the batches come from args.seed, though the directions and the initial weights do."""
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = make_trainer(classifier())
        trainer.train()
        ends.append(trainer.model.score.weight.detach())
    assert not torch.equal(*ends)


def test_second_training_is_refused_before_data_are_touched(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trainer.train_dataset = None
    with pytest.raises(BudgetExceededError, match="of which 0 are left"):
        trainer.train()


def test_step_beyond_the_plan_is_refused_before_data_are_touched(make_trainer):
    trainer = make_trainer()
    trainer.train()
    with pytest.raises(BudgetExceededError):
        trainer.training_step(trainer.model, inputs=None)


def test_stopping_early_claims_the_whole_plan(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = make_trainer(callbacks=[Stop()])
    trainer.train()
    assert len(trainer.budget.ledger) == 1
    assert trainer.budget.claimed_releases == ((trainer.budget.query, 4),)
    assert trainer.budget.closed


def test_an_interrupted_run_spends_the_whole_plan_and_keeps_its_weights(make_trainer):
    def interrupted(model, inputs):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return classification_loss(model, inputs)

    trainer = make_trainer(per_example_loss=interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.budget.closed


def classification_loss(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")


def test_training_without_rows_is_refused(make_trainer):
    with pytest.raises(ValueError, match="train_dataset=None"):
        make_trainer(train_dataset=None).train()


# ---- What leaves ----

SENTINEL = 12345.678


def leaves_of(folder: Path, capsys, caplog) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = [path.read_bytes().decode("utf-8", errors="ignore") for path in files]
    captured = capsys.readouterr()
    return "\n".join([*(path.name for path in files), *texts, captured.out, captured.err, caplog.text])


def test_training_losses_reach_no_log_no_file_and_no_stream(make_trainer, make_args, capsys, caplog):
    """A loss that is the same everywhere never changes the weights, so its digits may appear nowhere at all."""
    caplog.set_level(logging.DEBUG)

    def sentinel(model, inputs):
        return torch.full((len(inputs["labels"]),), SENTINEL) + 0 * classification_loss(model, inputs)

    args = make_args(save_strategy="steps", save_steps=2, disable_tqdm=False, log_level="debug")
    trainer = make_trainer(args=args, per_example_loss=sentinel, eval_dataset=None)
    output = trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", output.metrics)
    left = leaves_of(Path(args.output_dir), capsys, caplog)
    assert "12345" not in left
    assert str(SENTINEL) not in repr(output)


def test_logs_hold_released_and_public_values_alone(make_trainer, make_args):
    trainer = make_trainer(args=make_args(eval_strategy="steps", eval_steps=2))
    output = trainer.train()
    evaluated = {"eval_loss", "eval_accuracy", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    seen = set().union(*trainer.state.log_history)
    assert seen == {"learning_rate", "epsilon", "epoch", "step"} | evaluated
    assert output.metrics == {"epoch": 0.8, "epsilon": round_up(trainer.budget.guarantee().epsilon)}
    assert math.isnan(output.training_loss)
    assert trainer.state.total_flos == 0
    assert trainer.state.num_input_tokens_seen == 0


def test_logged_epsilon_grows_to_what_was_planned(make_trainer):
    trainer = make_trainer()
    trainer.train()
    epsilons = [log["epsilon"] for log in trainer.state.log_history if "epsilon" in log]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == pytest.approx(trainer.budget.guarantee().epsilon, abs=1e-4)


def test_progress_bar_shows_epsilon(make_trainer, make_args, capsys):
    make_trainer(args=make_args(disable_tqdm=False)).train()
    assert "epsilon=" in capsys.readouterr().err


def test_trackers_get_released_values_alone(make_trainer):
    seen = {}

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.update(logs)

    make_trainer(callbacks=[Tracker()]).train()
    assert "loss" not in seen and "train_loss" not in seen and "grad_norm" not in seen
    assert "epsilon" in seen


def test_a_run_without_noise_logs_no_epsilon(make_trainer, make_args):
    args = make_args(method="mezo", noise_multiplier="absent", target_delta="absent")
    trainer = make_trainer(args=args)
    trainer.train()
    assert "epsilon" not in set().union(*trainer.state.log_history)


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_evaluating_on_the_training_rows_is_refused(make_trainer, call):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="eval_dataset: it is the training data"):
        getattr(trainer, call)(trainer.train_dataset)


def test_neighbouring_data_move_the_release_by_at_most_a_clip_norm(make_trainer, make_args, monkeypatch):
    """Through the whole program, on the lattice, with every row in the batch and the noise frozen at nothing."""
    released = []
    monkeypatch.setattr(DiscreteGaussian, "add", lambda self, values: released.append(values) or list(values))
    rows = labelled_rows(ROWS)
    for data in (rows, rows.select(range(1, ROWS))):
        args = make_args(expected_batch_size=ROWS - 1, max_steps=1, clip_norm=0.01, per_device_train_batch_size=1)
        monkeypatch.setattr(BernoulliSampler, "draw", lambda mask: torch.ones(mask.size, dtype=torch.bool).numpy())
        torch.manual_seed(0)
        make_trainer(classifier(), args=args, train_dataset=data).train()
    assert 0 < abs(released[0][0] - released[1][0]) <= 1 << 40


@pytest.mark.parametrize("part", ["data_collator", "per_example_loss"])
def test_code_that_draws_from_a_global_generator_is_refused(make_trainer, tokenizer, part):
    pad = DataCollatorWithPadding(tokenizer)

    def random_collator(rows):
        torch.rand(1)
        return pad(rows)

    def random_loss(model, inputs):
        return classification_loss(model, inputs) * torch.rand(1)

    parts = {"data_collator": random_collator} if part == "data_collator" else {"per_example_loss": random_loss}
    with pytest.raises(GlobalRandomnessError, match=f"{part}: it draws from a global random generator"):
        make_trainer(**parts).train()


def test_random_transforms_of_rows_are_refused(make_trainer):
    class Augmented(torch.utils.data.Dataset):
        rows = labelled_rows(ROWS)

        def __len__(self):
            return ROWS

        def __getitem__(self, index):
            torch.rand(1)
            return self.rows[index]

    with pytest.raises(RuntimeError, match="train_dataset: it draws from a global random generator"):
        make_trainer(
            train_dataset=Augmented(),
        ).train()


def test_checkpoints_hold_no_generator_state(make_trainer, make_args):
    args = make_args(save_strategy="steps", save_steps=2)
    make_trainer(args=args).train()
    assert not list(Path(args.output_dir).rglob("rng_state*"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("expected_batch_size", 40),
        ("noise_multiplier", 9.0),
        ("seed", 1),
        ("max_steps", 5),
        ("learning_rate", 0.5),
        ("update", "adam"),
        ("trials", 2),
    ],
)
def test_arguments_changed_after_planning_are_refused(make_trainer, name, value):
    trainer = make_trainer()
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=f"{name}={value}: the budget was planned with"):
        trainer.train()


def test_arguments_are_checked_again_before_training(make_trainer):
    trainer = make_trainer()
    trainer.args.neftune_noise_alpha = 5.0
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        trainer.train()


def test_parts_are_checked_again_before_training(make_trainer):
    trainer = make_trainer()
    trainer.data_collator = DataCollatorWithFlattening()
    with pytest.raises(ValueError, match="it joins the rows"):
        trainer.train()
    trainer = make_trainer()
    trainer.add_callback(EarlyStoppingCallback())
    with pytest.raises(ValueError, match="EarlyStoppingCallback"):
        trainer.train()


def test_other_rows_than_planned_are_refused(make_trainer):
    trainer = make_trainer()
    trainer.train_dataset = labelled_rows(ROWS + 1)
    with pytest.raises(ValueError, match="it is not the one that the budget was planned for"):
        trainer.train()


def test_a_model_is_trained_by_one_trainer(make_trainer):
    model = with_lora(classifier())
    make_trainer(model).train()
    with pytest.raises(ValueError, match="another run has trained it"):
        make_trainer(model).train()


def test_model_made_at_the_last_moment_is_checked(make_trainer):
    made = iter([classifier(), classifier().to(torch.bfloat16)])
    trainer = ZOTrainer(model_init=lambda: next(made), args=make_trainer().args, train_dataset=labelled_rows(ROWS))
    with pytest.raises(ValueError, match=r"it is trained in torch\.bfloat16"):
        trainer.train()


def test_metrics_that_pass_for_training_metrics_are_refused(make_trainer):
    with pytest.raises(ValueError, match="metric_key_prefix=train"):
        make_trainer().evaluate(metric_key_prefix="train")


# ---- The Trainer as users know it ----


def test_schedule_callbacks_and_checkpoints_work(make_trainer, make_args):
    args = make_args(lr_scheduler_type="linear", save_strategy="steps", save_steps=2, save_total_limit=1)
    trainer = make_trainer(args=args)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]
    checkpoint = Path(args.output_dir) / "checkpoint-4"
    assert (checkpoint / "privacy.json").is_file()
    assert json.loads((checkpoint / "privacy.json").read_text())["claim"]["steps_taken"] == 4


def test_logged_learning_rate_is_that_of_the_stage(make_trainer, make_args):
    args = make_args(method="zoso", num_stages=2, max_steps=6, learning_rate=0.08, lr_scheduler_type="constant")
    trainer = make_trainer(args=args)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([0.08, 0.08, 0.04, 0.04, 0.04, 0.04])


def test_warmup_from_zero_is_not_taken_for_a_run_that_does_nothing(make_trainer, make_args):
    trainer = make_trainer(args=make_args(warmup_steps=2))
    trainer.train()
    assert trainer.state.global_step == 4


def test_best_model_is_loaded_where_the_evaluation_data_are_public(make_trainer, make_args):
    args = make_args(
        load_best_model_at_end=True,
        eval_data_is_public=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        metric_for_best_model="accuracy",
    )
    trainer = make_trainer(args=args)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert len(trainer.budget.ledger) == 4


def test_predictions_are_scores_with_or_without_labels(make_trainer):
    trainer = make_trainer()
    rows = labelled_rows(6, seed=3)
    with_labels = trainer.predict(rows)
    without = trainer.predict(rows.remove_columns("labels"))
    assert with_labels.predictions.shape == without.predictions.shape == (6, 2)
    assert torch.equal(torch.tensor(with_labels.predictions), torch.tensor(without.predictions))
    assert "test_accuracy" in with_labels.metrics


def test_evaluation_loss_is_the_mean_of_the_rows(make_trainer):
    trainer = make_trainer()
    alone = [trainer.evaluate(trainer.eval_dataset.select([row]))["eval_loss"] for row in range(12)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(alone) / 12, rel=1e-4)


def test_adapter_reloads_with_the_same_predictions(make_trainer):
    torch.manual_seed(3)
    base = classifier()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = make_trainer(with_lora(base))
    trainer.train()
    trainer.save_model()
    again = classifier()
    again.load_state_dict(weights)
    reloaded = PeftModel.from_pretrained(again, trainer.args.output_dir, is_trainable=True)
    expected = trainer.predict(trainer.eval_dataset).predictions
    assert (make_trainer(reloaded, args=trainer.args).predict(trainer.eval_dataset).predictions == expected).all()


def test_causal_language_models_train(make_trainer, tokenizer):
    rows = Dataset.from_list(
        [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in labelled_rows(ROWS)]
    )
    trainer = make_trainer(
        with_lora(causal_lm(), TaskType.CAUSAL_LM),
        train_dataset=rows,
        eval_dataset=rows.select(range(5)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=None,
    )
    assert isinstance(trainer.per_example_loss, CausalLMLoss)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_prompts_train_and_predict_labels(make_trainer, tokenizer):
    prompt = Prompt(template="{text} :", label_words=("bad", "good"))
    encoded = [{**prompt.encode({"text": f"w{i} w{i + 1}"}, tokenizer, 16), "labels": i % 2} for i in range(ROWS - 2)]
    model = with_lora(causal_lm(), TaskType.CAUSAL_LM)
    trainer = make_trainer(
        model,
        train_dataset=Dataset.from_list(encoded),
        eval_dataset=Dataset.from_list(encoded[:6]),
        per_example_loss=prompt.loss(model, tokenizer),
    )
    trainer.train()
    assert set(trainer.evaluate()) >= {"eval_loss", "eval_accuracy"}
    assert trainer.predict(Dataset.from_list(encoded[:6]).remove_columns("labels")).predictions.shape == (6, 2)


def test_losses_need_not_be_differentiable(make_trainer, make_args):
    def errors(model, inputs):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return (logits.argmax(-1) != inputs["labels"]).float()

    trainer = make_trainer(per_example_loss=errors, args=make_args(per_device_train_batch_size=1))
    trainer.train()
    assert trainer.state.global_step == 4
    assert 0 <= trainer.evaluate()["eval_loss"] <= 1


def test_dropout_is_off_while_losses_are_compared(make_trainer):
    modes = []

    def watching(model, inputs):
        modes.append(model.training)
        return classification_loss(model, inputs)

    trainer = make_trainer(per_example_loss=watching)
    trainer.model.train()
    trainer.train()
    assert modes and not any(modes)


# ---- Runs that would train nothing ----


def test_outputs_that_ignore_the_parameters_stop_the_run(make_trainer):
    model = classifier().requires_grad_(False)
    model.unused = torch.nn.Parameter(torch.zeros(4))
    trainer = make_trainer(model)
    with pytest.raises(RuntimeError, match="the model's outputs are the same at both probe points"):
        trainer.train()
    assert len(trainer.budget.ledger) == 0


@pytest.mark.parametrize("full", [False, True])
def test_updates_that_never_reach_the_parameters_stop_the_run(make_trainer, monkeypatch, full):
    """Where all parameters are trained, the walk's way back alone is no update either."""
    monkeypatch.setattr(ZOOptimizer, "step", lambda self, closure=None: self.settle())
    with pytest.raises(RuntimeError, match="the first update moved no parameter"):
        make_trainer(*[classifier()] * full).train()


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_updates_too_small_for_float32_stop_the_run(make_trainer, make_args, kind):
    with pytest.raises(RuntimeError, match="learning_rate=1e-30: the first update moved no parameter; raise it"):
        make_trainer(classifier(), args=make_args(learning_rate=1e-30, directions=kind)).train()


@pytest.mark.parametrize("place", ["release", "append"])
def test_an_error_between_the_walk_and_the_update_leaves_the_weights_where_they_were(
    make_trainer, make_args, monkeypatch, place
):
    """All parameters are trained, so that no copy of them is at hand."""
    trainer = make_trainer(classifier(), args=make_args(smoothing=0.5))
    before = state(trainer.model)

    def broken(*args) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(*{"release": (IntegerSum, "release"), "append": (RunLog, "append")}[place], broken)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-6)


def test_guard_leaves_the_parameters_as_they_were(make_trainer, monkeypatch):
    monkeypatch.setattr(ZOTrainer, "training_step", lambda *args: pytest.fail("too far"))
    trainer = make_trainer(classifier())
    before = state(trainer.model)
    with pytest.raises(BaseException, match="too far"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


# ---- Hooks of the stock Trainer that are overridden ----

SIGNATURES = {
    "_save_rng_state": ["self", "output_dir"],
    "_load_rng_state": ["self", "checkpoint"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_init_training_state": [
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    "create_accelerator_and_postprocess": ["self"],
    "get_train_dataloader": ["self"],
    "get_total_train_batch_size": ["self", "args"],
    "floating_point_ops": ["self", "inputs"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_learning_rate": ["self"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "predict": ["self", "test_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["self", "logs", "start_time"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "create_model_card": [
        "self",
        "language",
        "license",
        "tags",
        "model_name",
        "finetuned_from",
        "tasks",
        "dataset_tags",
        "dataset",
        "dataset_args",
    ],
    "push_to_hub": ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_finish_current_push": ["self"],
    "_load_best_model": ["self"],
    "_hp_search_setup": ["self", "trial"],
    "_get_output_dir": ["self", "trial"],
    "hyperparameter_search": [
        "self",
        "hp_space",
        "compute_objective",
        "n_trials",
        "direction",
        "backend",
        "hp_name",
        "kwargs",
    ],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_overridden_hook_has_the_signature_of_the_stock_one(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == SIGNATURES[name]
    own = list(inspect.signature(getattr(ZOTrainer, name)).parameters)
    # Arguments of generation are passed on to `Seq2SeqTrainer`.
    assert own == [*SIGNATURES[name], *["options"] * (name in ("prediction_step", "evaluate", "predict"))]


def test_constructor_takes_what_the_stock_one_takes():
    stock = list(inspect.signature(Trainer.__init__).parameters)
    stock.remove("optimizer_cls_and_kwargs")
    own = ["per_example_loss", "probe_rows", "others"]
    assert [*stock, *own] == list(inspect.signature(ZOTrainer.__init__).parameters)


def test_stock_loop_still_asks_for_the_private_hooks():
    assert "self._get_grad_norm(model, grad_norm=grad_norm)" in inspect.getsource(Trainer._run_epoch)
    assert 'logs["learning_rate"] = self._get_learning_rate()' in inspect.getsource(Trainer._maybe_log_save_evaluate)
    saved = inspect.getsource(Trainer._save_checkpoint)
    assert saved.index("self._save_optimizer_and_scheduler(") < saved.index("self._save_rng_state(")
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert loop.index("= self._init_training_state(") < loop.index("= self._prepare_for_training(")
    assert loop.index("= self._prepare_for_training(") < loop.index("callback_handler.on_train_begin(")
    assert "self._run_epoch(\n                model=model," in loop
    assert "resume_from_checkpoint=resume_from_checkpoint" in loop[loop.index("self._run_epoch(") :]
    assert "self._load_from_checkpoint(resume_from_checkpoint)" in inspect.getsource(Trainer.train)
    assert "self._load_optimizer_and_scheduler(" in inspect.getsource(Trainer._prepare_for_training)
    epoch = inspect.getsource(Trainer._run_epoch)
    assert epoch.count("resume_from_checkpoint") == 4  # The argument, whether to skip, and two loads of generators.
    assert "self.optimizer_cls_and_kwargs" in inspect.getsource(Trainer.create_optimizer)
    # Checkpoints are pushed once they are whole but for their mark, and the last push is waited for.
    assert saved.index("self.state.save_to_json(") < saved.index("self._push_from_checkpoint(output_dir)")
    finished = inspect.getsource(Trainer._finalize_training)
    assert finished.index("self._load_best_model()") < finished.index("self._finish_current_push()")
    assert "self.push_to_hub(" in inspect.getsource(Trainer.save_model)


def test_no_gradient_machinery_is_set_up(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert trainer.accelerator.scaler is None
    assert trainer.accelerator.prepare_model.keywords == {"evaluation_mode": True}
    assert trainer.model_wrapped is trainer.model
