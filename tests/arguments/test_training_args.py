"""Flags: what is planned from them, and what is refused, each in one clear sentence before data are touched."""

import inspect
from dataclasses import fields

import pytest
import torch
from accelerate import DistributedType
from peft import TaskType
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_dpzo import ZOSeq2SeqTrainingArguments, ZOTrainer, ZOTrainingArguments
from hf_dpzo.arguments.foreign import FOREIGN_FIELDS
from hf_dpzo.models.checks import refuse_model, refuse_unsupported_sharding
from hf_dpzo.models.precision import refuse_variable_shapes
from hf_dpzo.privacy.accounting import account
from hf_dpzo.privacy.mechanism import ClippedSum
from hf_dpzo.privacy.queries import NonPrivateQuery
from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.zo.updates import SGD, Adam, Momentum

from support.models import causal_lm, classifier, with_lora
from support.rows import labelled_rows


def test_the_plan_meets_the_target_epsilon(make_args):
    args = make_args(noise_multiplier="absent", target_epsilon=2.0, max_steps=50)
    method, budget = args.plan(num_units=1000)
    assert 1.9 < budget.guarantee().epsilon <= 2.0
    assert budget.query.sampling_rate == 0.008
    assert method.noise_multiplier <= budget.query.noise_multiplier < method.noise_multiplier * (1 + 1e-9)


def test_a_given_noise_multiplier_is_kept(make_args):
    method, budget = make_args(noise_multiplier=0.9, max_steps=50).plan(num_units=1000)
    assert method.noise_multiplier == 0.9
    assert budget.guarantee() == account(((budget.query, 50),), delta=1e-4)


def test_trials_are_planned_together(make_args):
    alone = make_args(max_steps=50).plan(num_units=1000)[1]
    _, budget = make_args(max_steps=50, trials=3).plan(num_units=1000)
    assert (budget.planned_steps, budget.claimed_releases) == (50, ((budget.query, 150),))
    assert budget.guarantee() == account(((alone.query, 150),), delta=1e-4)


def test_the_target_epsilon_covers_all_trials(make_args):
    target = {"noise_multiplier": "absent", "target_epsilon": 2.0}
    one, together = make_args(**target, max_steps=150), make_args(**target, max_steps=50, trials=3)
    assert together.plan(num_units=1000)[0].noise_multiplier == one.plan(num_units=1000)[0].noise_multiplier
    assert 1.9 < together.plan(num_units=1000)[1].guarantee().epsilon <= 2.0


@pytest.mark.parametrize(("epochs", "steps"), [(1, 125), (0.5, 63), (3, 375)])
def test_epochs_are_planned_as_the_trainer_counts_them(make_args, epochs, steps):
    _, budget = make_args(max_steps=-1, num_train_epochs=epochs).plan(num_units=1000)
    assert budget.planned_steps == steps


def test_numbers_written_as_text_are_read(make_args):
    args = make_args(smoothing="1e-3", target_delta="1e-6", expected_batch_size="16", learning_rate="1e-2")
    assert (args.smoothing, args.target_delta, args.expected_batch_size) == (1e-3, 1e-6, 16)
    assert args.learning_rate == 1e-2


REFUSED = [
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2: .* set expected_batch_size"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True: .* lower per_device_train_batch_size"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: .* per_example_loss"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0: .* remove it"),
    ({"optim": "sgd"}, "optim=sgd: there are no gradients"),
    ({"max_grad_norm": 1.0}, "max_grad_norm=1.0: .* set clip_norm"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy=group_by_length: .* Poisson"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last=True"),
    ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches=True"),
    ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches=True"),
    ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen=all: .* which rows"),
    ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, "hub_strategy=all_checkpoints: .* every_save"),
    ({"tuning_runs": 0}, "tuning_runs=0"),
    ({"trials": 0}, "trials=0: it must be a whole number from 1"),
    ({"trials": 2.5}, "trials=2.5: it must be a whole number"),
    ({"trials": None}, "trials=None: it must be a whole number, this run among them"),
    ({"trials": 3, "tuning_runs": 2}, "tuning_runs=2: trials=3 counts more runs than that; raise it"),
    (
        {"method": "mezo", "noise_multiplier": "absent", "target_delta": "absent", "trials": 2},
        "trials=2: without noise there is no guarantee to cover them",
    ),
    ({"bf16": True}, "bf16=True: autocast rounds what is trained"),
    ({"load_best_model_at_end": True, "eval_strategy": "no"}, "load_best_model_at_end=True: .* eval_data_is_public"),
    (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        "lr_scheduler_type=reduce_lr_on_plateau: .* eval_data_is_public",
    ),
    ({"debug": "underflow_overflow"}, "debug=.*: it prints what the model computes"),
    ({"skip_memory_metrics": False}, "skip_memory_metrics=False"),
    ({"bf16_full_eval": True}, "bf16_full_eval=True"),
    ({"fp16_full_eval": True}, "fp16_full_eval=True"),
    (
        {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"},
        "save_strategy=best: .* eval_data_is_public",
    ),
    ({"method": "adam"}, "method='adam': choose one of aggzo, dpzero, dpzo, mezo, projected, zopo, zoso"),
    ({"directions": "cauchy"}, "directions='cauchy': choose one of gaussian, rademacher, sphere"),
    ({"target_epsilon": 1.0}, "give one of the two"),
    ({"noise_multiplier": "absent"}, "target_epsilon=None, noise_multiplier=None"),
    (
        {"noise_multiplier": "absent", "target_delta": "absent"},
        "noise_multiplier=None: give one of the two; .* from target_delta, which is missing too",
    ),
    ({"target_delta": "absent"}, "target_delta=None: a guarantee needs a delta"),
    ({"target_delta": 1.0}, "target_delta=1.0"),
    ({"target_delta": "soon"}, "target_delta='soon': it must be a number"),
    ({"noise_multiplier": 0.0}, "noise_multiplier=0: it must be positive"),
    ({"noise_multiplier": float("nan")}, "noise_multiplier=nan: it must be positive"),
    ({"clip_norm": -1}, "clip_norm=-1: it must be positive"),
    ({"smoothing": 0}, "smoothing=0: it must be positive"),
    ({"expected_batch_size": 2.5}, "expected_batch_size=2.5: it must be a whole number"),
    (
        {"num_directions": 4},
        "num_directions=4: method=dpzero has no such .* aggzo, mezo, projected, zopo, zoso",
    ),
    (
        {"method": "mezo"},
        "noise_multiplier=1.0: method=mezo has no such .* aggzo, dpzero, dpzo, projected",
    ),
    ({"method": "mezo", "noise_multiplier": "absent"}, "method=mezo: without noise no epsilon or delta holds"),
    (
        {"method": "projected", "radius": 1, "noise_multiplier": 0},
        "noise_multiplier=0: without noise no",
    ),
    ({"method": "projected"}, "radius=None: method=projected has no default for it; set it"),
    ({"method": "projected", "radius": "far"}, "radius='far': it must be a number"),
    ({"difference": "backward"}, "difference='backward': choose one of central, forward"),
    ({"noise": "laplace"}, "noise=laplace: method=dpzero has no such parameter; .* dpzo"),
    ({"method": "dpzo", "noise": "cauchy"}, "noise='cauchy': choose one of gaussian, laplace"),
    ({"method": "dpzo", "paper_noise": True}, "paper_noise=True: method=dpzo has no such parameter; .* dpzero"),
    ({"method": "zoso", "num_stages": 0}, "num_stages=0: it must be a whole number from 1"),
    ({"method": "zoso", "num_stages": 1.5}, "num_stages=1.5: it must be a whole number"),
    ({"method": "zoso", "mask": "static"}, "mask=static: method=zoso has no such parameter; .* zopo"),
    ({"method": "zopo", "mask": "rank"}, "mask='rank': choose one of dynamic, static"),
    ({"method": "zopo", "pruning_ratio": 1.5}, "pruning_ratio=1.5: it is a share of coordinates"),
    ({"update": "lion"}, "update='lion': choose one of adam, momentum, normalized, sgd"),
    ({"update": "normalized"}, "update=normalized: num_directions=1 has no spread"),
    ({"method": "aggzo", "num_directions": 1, "update": "normalized"}, "num_directions=1 has no spread"),
    ({"update": "adam", "adam_epsilon": 0.0}, "adam_epsilon=0.0: the betas lie in"),
    ({"update": "adam", "adam_beta1": 1.0}, "adam_beta1=1.0, .* correct them"),
    ({"adam_beta1": 0.5}, "adam_beta1=0.5: update=adam alone reads it"),
    ({"weight_decay": -1.0}, "weight_decay=-1.0: it would make the parameters grow"),
    ({"method": "zoso", "anchor_strength": -1}, "anchor_strength=-1: it must be positive or 0"),
    ({"paper_noise": "false"}, "paper_noise='false': it must be true or false"),
    ({"clip_norm": 1e300}, r"clip_norm=1e\+300: it must be finite in float32"),
    ({"method": "aggzo", "num_directions": 2**31}, "it must be a whole number from 1 to"),
    ({"momentum": 0.9}, "momentum=0.9: it is the share that update=momentum keeps"),
    ({"update": "momentum", "momentum": 1}, "momentum=1.0: .* less than 1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_unsupported_arguments_are_refused(make_args, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_args(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bf16": True}, "bf16=True: autocast rounds .* load a frozen base with dtype=bfloat16"),
        ({"bf16": True, "fp16": True}, "fp16=True: autocast rounds"),
        ({"bf16_full_eval": True, "fp16_full_eval": True}, "fp16_full_eval=True: it leaves the weights"),
        ({"tf32": True}, "tf32=True: it rounds to 10 bits"),
        ({"optim": "lion9"}, "optim=lion9: there are no gradients"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "lr_scheduler_type=reduce_lr_on_plateau: .* eval_data_is_public",
        ),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True: .* eval_data_is_public"),
        ({"deepspeed": "none.json"}, "deepspeed=none.json: its engine never calls"),
        ({"debug": "all"}, "debug=all: it prints what the model computes"),
        ({"fsdp": "all"}, "fsdp=all: accelerate would split the model"),
        ({"hub_strategy": "never", "push_to_hub": True}, "hub_strategy=never: .* set every_save, or end"),
    ],
    ids=str,
)
def test_what_stock_would_refuse_for_another_reason_is_refused_for_its_own(tmp_path, changes, message):
    """Of each of them stock says that this machine or another argument does not allow it."""
    with pytest.raises(ValueError, match=message):
        ZOTrainingArguments(str(tmp_path), noise_multiplier=1.0, target_delta=1e-4, report_to="none", **changes)


def test_all_arguments_that_a_script_has_to_drop_are_named_at_once(make_args):
    """Whoever comes from another trainer has several, and would meet one at each start."""
    given = {"gradient_accumulation_steps": 4, "optim": "adamw_8bit", "max_grad_norm": 0.3, "bf16": True}
    with pytest.raises(ValueError, match="set expected_batch_size") as caught:
        make_args(**given)
    said = str(caught.value)
    assert all(f"{name}={value}: " in said for name, value in given.items()) and said.count("remove it.") == 1


@pytest.mark.parametrize("kind", [ZOTrainingArguments, ZOSeq2SeqTrainingArguments])
def test_names_of_other_libraries_are_explained(tmp_path, kind):
    known = {entry.name for one in (Recipe, kind) for entry in fields(one)} - {"max_length"}  # Of recipes alone.
    for name in [*FOREIGN_FIELDS, "center_rewards_coefficient", "activation_offloading"]:
        assert name not in known
        with pytest.raises(ValueError, match=rf"^{name}: .+; .+\.$"):
            kind(str(tmp_path), noise_multiplier=1.0, target_delta=1e-4, **{name: True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'noise_multiplyer'"):
        kind(str(tmp_path), noise_multiplyer=1.0)
    assert "noise_multiplier" in inspect.signature(kind).parameters


def test_mixed_precision_from_the_environment_is_refused(make_args, monkeypatch):
    """`accelerate launch` sets it there."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="mixed_precision=bf16: autocast rounds"):
        make_args()


def test_several_devices_in_a_process_are_refused(make_args, monkeypatch):
    monkeypatch.setattr(ZOTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"n_gpu=2: nn\.DataParallel"):
        make_args()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_wrappers_that_split_the_model_are_refused(kind, make_args):
    with pytest.raises(ValueError, match=f"^distributed_type={kind}: it would change the model behind "):
        refuse_unsupported_sharding(classifier(), make_args(), distributed_type=DistributedType(kind).value)


def test_audits_of_runs_without_noise_are_refused(make_args):
    with pytest.raises(ValueError, match=r"^audit=True: without noise nothing is claimed; remove it"):
        make_args(method="mezo", noise_multiplier=None, target_delta=None, expected_batch_size=8, audit=True)


def test_packing_is_refused_in_configurations_that_have_it(make_args):
    class Packed(ZOTrainingArguments):
        packing = True

    with pytest.raises(ValueError, match="packing=True: a packed row holds several examples"):
        Packed(output_dir="x", noise_multiplier=1.0, target_delta=1e-5, report_to="none", use_cpu=True)


def test_deepspeed_and_fsdp_are_refused(make_args, monkeypatch):
    """Their plugins need libraries and devices that tests lack, so the flags are set on finished arguments."""
    from hf_dpzo.arguments.unsupported import refuse_arguments

    for name, value in (("deepspeed", {"zero_optimization": {"stage": 2}}), ("fsdp", True), ("fp16", True)):
        args = make_args()
        setattr(args, name, value)
        with pytest.raises(ValueError, match=f"{name}="):
            refuse_arguments(args)


def test_public_evaluation_data_may_choose_the_model(make_args):
    args = make_args(
        load_best_model_at_end=True, eval_data_is_public=True, eval_strategy="steps", save_strategy="steps"
    )
    assert args.load_best_model_at_end


@pytest.mark.parametrize(("rows", "message"), [(4, "the training data have 4 rows"), (20_000, "choose at most 5e-06")])
def test_data_that_do_not_fit_the_plan_are_refused(make_args, rows, message):
    with pytest.raises(ValueError, match=message):
        make_args().plan(num_units=rows)


# ---- Parts that a user passes to the trainer ----


def refused_part(make_args, message, **parts):
    given = {"model": classifier(), "args": make_args(), "train_dataset": labelled_rows(40), **parts}
    with pytest.raises(ValueError, match=message):
        ZOTrainer(**given)


def test_iterable_data_are_refused(make_args):
    refused_part(make_args, "train_dataset=IterableDataset", train_dataset=labelled_rows(40).to_iterable_dataset())


def test_flattening_collators_are_refused(make_args):
    refused_part(make_args, "DataCollatorWithFlattening: it joins", data_collator=DataCollatorWithFlattening())


def test_collators_that_mask_at_random_are_refused(make_args, tokenizer):
    refused_part(make_args, "its random masks", data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=True))


def test_left_padding_is_refused_where_it_moves_positions(make_args, tokenizer):
    model = BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    refused_part(make_args, "padding_side=left: .*padding_side='right'", model=model, processing_class=tokenizer)


def test_batch_losses_are_refused(make_args):
    refused_part(make_args, "pass per_example_loss", compute_loss_func=lambda *_: 0)


def test_optimizers_of_the_users_own_are_refused(make_args):
    refused_part(make_args, "optimizers: the update is made by", optimizers=(object(), None))


@pytest.mark.parametrize("callback", [EarlyStoppingCallback, EarlyStoppingCallback()])
def test_early_stopping_on_private_data_is_refused(make_args, callback):
    refused_part(make_args, r"EarlyStoppingCallback: .* eval_data_is_public", callbacks=[callback])


def test_plain_training_arguments_are_refused():
    with pytest.raises(ValueError, match="args=NoneType: ZOTrainer needs ZOTrainingArguments"):
        ZOTrainer(model=classifier())


# ---- Models ----


def test_a_model_with_nothing_to_train_is_refused(make_args):
    refused_part(make_args, "none of its parameters requires grad", model=classifier().requires_grad_(False))


def test_parameters_on_the_meta_device_are_refused():
    with pytest.raises(ValueError, match="it is on the meta device"):
        refuse_model(classifier().to("meta"), private=True)


def test_a_model_that_is_partly_on_disk_is_refused(make_args, tmp_path):
    """Its weights are loaded from there again for each forward pass, so changes to them are lost."""
    classifier().save_pretrained(tmp_path / "base")
    placed = {"device_map": {"model": "cpu", "score": "disk"}, "offload_folder": tmp_path / "offloaded"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **placed)
    with pytest.raises(ValueError, match=r"^parameter=score\.weight: it is on the meta device, where changes are lost"):
        ZOTrainer(model=model, args=make_args(), train_dataset=labelled_rows(20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_trainable_parameters_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"it is trained in {dtype}.*dtype=torch.float32"):
        refuse_model(classifier().to(dtype), private=False)


def test_16_bit_base_under_an_adapter_is_refused_where_shapes_are_not_fixed():
    model = with_lora(causal_lm().to(torch.bfloat16), TaskType.CAUSAL_LM)
    refuse_model(model, private=False)
    with pytest.raises(ValueError, match="by its shape; set padded_lengths"):
        refuse_variable_shapes(model, fixed=False)
    refuse_variable_shapes(model, fixed=True)


def test_parameters_that_are_not_contiguous_are_refused():
    model = classifier()
    model.score.weight = torch.nn.Parameter(torch.randn(16, 2).t())
    with pytest.raises(ValueError, match=r"score.weight: it is not contiguous"):
        refuse_model(model, private=False)


def test_router_losses_are_refused():
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, output_router_logits=True))
    with pytest.raises(ValueError, match=r"output_router_logits=True: .* set it to False"):
        refuse_model(model, private=True)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_row_are_refused(rope_type):
    model = causal_lm()
    model.config.rope_parameters = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=f"rope_type={rope_type}"):
        refuse_model(model, private=True)


def test_quantized_models_are_refused():
    model = causal_lm()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ValueError, match="quantization_config=bitsandbytes: it is not known"):
        refuse_model(model, private=True)


def test_reduced_matmul_precision_is_refused():
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ValueError, match="float32_matmul_precision=medium"):
            refuse_model(causal_lm(), private=True)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_float32_models_are_accepted():
    refuse_model(causal_lm(), private=True)


@pytest.mark.parametrize("stages", [3, 2000])
def test_stages_that_do_not_fit_into_the_plan_are_refused(make_args, stages):
    args = make_args(method="zoso", num_stages=stages, max_steps=6)
    with pytest.raises(ValueError, match=rf"num_stages={stages}: .*{stages} - 1 steps, and there are 6; lower it"):
        args.plan(num_units=100)


@pytest.mark.parametrize("zero", [0, 0.0, "0", "0.0", -0.0])
def test_projected_without_noise_is_a_run_without_privacy(make_args, zero):
    args = make_args(method="projected", radius=1.0, noise_multiplier=zero, target_delta="absent")
    method, budget = args.plan(num_units=100)
    assert not args.private
    assert not budget.private
    assert budget.query == NonPrivateQuery()
    assert method.mechanism == ClippedSum(clip_norm=1.0, expected_batch_size=8)


def test_calibrating_for_paper_noise_leaves_less_epsilon_than_the_target(make_args):
    plain, doubled = (
        make_args(noise_multiplier="absent", target_epsilon=2.0, paper_noise=paper).plan(num_units=100)
        for paper in (False, True)
    )
    assert doubled[0].noise_multiplier == plain[0].noise_multiplier
    assert doubled[1].query.noise_multiplier == pytest.approx(2 * plain[1].query.noise_multiplier)
    assert doubled[1].guarantee().epsilon < 0.7 * plain[1].guarantee().epsilon


def test_laplace_noise_is_calibrated_for_pure_epsilon(make_args):
    args = make_args(method="dpzo", noise="laplace", noise_multiplier="absent", target_epsilon=2.0)
    stated = args.plan(num_units=100)[1].guarantee()
    assert 1.999 < stated.pure <= 2.0
    assert stated.epsilon < stated.pure


def test_update_rules_are_built_from_their_flags(make_args):
    assert make_args(update="momentum", momentum=0.5).update_rule == Momentum(momentum=0.5)
    assert make_args(update="momentum").update_rule == Momentum()
    adam = make_args(update="adam", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6).update_rule
    assert adam == Adam(betas=(0.8, 0.95), epsilon=1e-6)
    assert make_args().update_rule == SGD()


IMPOSSIBLE = [
    ({"method": "zoso", "num_stages": 1, "final_smoothing": 1e-4}, "final_smoothing=0.0001: num_stages=1 has no later"),
    (
        {"method": "zoso", "num_directions": 8, "num_stages": 1, "noise_multiplier": 4000},
        "noise_multiplier=11313.7 clip",
    ),
    ({"noise_multiplier": 9000}, "noise_multiplier=9000 clip norms: from 8192 on"),
    ({"noise_multiplier": "absent", "target_epsilon": 1e-5}, "raise target_epsilon"),
    ({"noise_multiplier": 0.01}, r"epsilon=.*: more than 1000 promises nothing; lower target_epsilon, or raise"),
    ({"method": "dpzo", "noise": "laplace", "noise_multiplier": 1e-5}, "more than 1000 promises nothing"),
    ({"method": "projected", "radius": 1, "noise_multiplier": 1e-320}, "promises nothing"),
    ({"expected_batch_size": 3_000_000}, "expected_batch_size=3000000: sums are exact for up to"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE, ids=[str(changes) for changes, _ in IMPOSSIBLE])
def test_impossible_plans_are_refused(make_args, changes, message):
    args = make_args(**{"target_delta": 1e-8, **changes})
    with pytest.raises(ValueError, match=message) as caught:
        args.plan(num_units=10_000_000 if "expected_batch_size" in changes else 100)
    assert "\n" not in str(caught.value)


def test_tokens_are_refused_without_being_shown(make_args):
    """They would be saved in each checkpoint."""
    with pytest.raises(ValueError, match="hub_token: it would be saved beside the weights") as caught:
        make_args(hub_token="hf_secret")
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padded_lengths": [16, 8]}, "padded_lengths=.* lengths must grow"),
        ({"padded_lengths": 8}, "padded_lengths=8: it must be a list"),
        ({"padded_lengths": [8, 8]}, "padded_lengths=.* lengths must grow"),
        ({"padded_lengths": [0]}, "padded_lengths=0: it must be a whole number"),
        ({"privacy_unit_column": "user", "max_rows_per_unit": 0}, "max_rows_per_unit=0"),
    ],
)
def test_invalid_units_and_lengths_are_refused(make_args, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(**settings)


def test_all_rows_or_all_users_are_in_each_batch_of_a_full_batch(make_args):
    method, budget = make_args(expected_batch_size="all", target_epsilon=2.0, noise_multiplier="absent").plan(120)
    assert (method.expected_batch_size, budget.query.sampling_rate) == (120, 1.0)
    users = [{"user": number % 3, "text": ""} for number in range(9)]
    args = make_args(expected_batch_size="all", privacy_unit_column="user", max_rows_per_unit=3)
    assert args.plan(len(args.build_units(users)))[0].expected_batch_size == 3


@pytest.mark.parametrize("value", [None, "some", 0, "-1", 1.5])
def test_a_batch_size_is_a_number_or_all(make_args, value):
    with pytest.raises(ValueError, match=r"expected_batch_size=.*whole number from 1 to 2\*\*31 - 1, or all"):
        make_args(expected_batch_size=value)


def test_one_set_of_arguments_serves_data_sets_of_several_sizes(make_args):
    args = make_args(expected_batch_size="all", max_steps=1)
    assert [args.plan(count)[0].expected_batch_size for count in (8, 20)] == [8, 20]
