"""The losses of TRL's trainers: each row's is what TRL computes of that row alone, whatever is beside it."""

import copy
import inspect
import re

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, TaskType

from hf_dpzo.losses.reference import AdapterReference, ModelReference
from hf_dpzo.models.switching import switched_adapter
from hf_dpzo.trainer.joined_losses import build_dpo_loss, refuse_shared_reference
from hf_dpzo.trl import ZODPOConfig, ZODPOTrainer, ZORewardConfig, ZORewardTrainer, ZOSFTConfig, ZOSFTTrainer

from support.models import causal_lm, classifier, word_tokenizer


PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-2, "expected_batch_size": 1}
COMMON = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False}
PAIRS = [
    {"prompt": "w1 w2 ", "chosen": "w3", "rejected": "w4 w5 w6"},
    {"prompt": "w7 ", "chosen": "w8 w9 w10 w11", "rejected": "w12"},
    {"prompt": "w1 w2 w3 w4 ", "chosen": "w5 w6", "rejected": "w7 w8"},
]
# Every loss of DPO that is a loss of one pair, and what it reads.
LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.3},
    "sft": {},
    "sigmoid_norm": {},
}
FORMS = [
    *[{"loss_type": [name], **options} for name, options in LOSSES.items()],
    *[{"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")],
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    {"ld_alpha": 0.3},
    {"beta": 0.7},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture
def build(tmp_path):
    """Return a function that builds ours and TRL's trainer, of the same model, from the same arguments."""

    def build_both(name: str, model: torch.nn.Module, rows: list, *, private=None, **options) -> tuple:
        ours, config = {
            "SFT": (ZOSFTTrainer, ZOSFTConfig),
            "Reward": (ZORewardTrainer, ZORewardConfig),
            "DPO": (ZODPOTrainer, ZODPOConfig),
        }[name]
        parts = {"train_dataset": Dataset.from_list(rows), "processing_class": word_tokenizer()}
        stock_args = getattr(trl, f"{name}Config")(
            str(tmp_path / "stock"), gradient_checkpointing=None, **COMMON, **options
        )
        reference = {"ref_model": nudged(model)} if name == "DPO" else {}
        stock = getattr(trl, f"{name}Trainer")(model=copy.deepcopy(model), args=stock_args, **parts, **reference)
        args = config(str(tmp_path / "ours"), **COMMON, **PRIVATE, **options, **(private or {}))
        reference = {"ref_model": nudged(model)} if name == "DPO" else {}
        return ours(model=copy.deepcopy(model), args=args, **parts, **reference), stock

    return build_both


def nudged(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy whose log-probabilities are others, so that a reference counts."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    return other


def collate(trainer, rows: list[dict]) -> dict[str, torch.Tensor]:
    kept = [{name: value for name, value in row.items() if name in trainer._signature_columns} for row in rows]
    return trainer.data_collator(kept)


def compare(ours, stock, *, evaluate=False) -> None:
    """Fail unless the losses of all rows together are TRL's losses of each row alone."""
    for trainer in (ours, stock):
        trainer._set_signature_columns_if_needed()
        trainer.model.eval()
    rows = list(ours.train_dataset)
    with torch.no_grad():
        batch = collate(ours, rows)
        loss = ours.per_example_loss
        losses = loss.evaluate(ours.model, batch)[0] if evaluate else loss(ours.model, batch)
        alone = torch.stack([stock.compute_loss(stock.model, collate(stock, [row])) for row in stock.train_dataset])
    assert len({*losses.tolist()}) == len(rows), "all losses are the same, which shows nothing"
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-6)


# ---- Rewards ----


@pytest.mark.parametrize("options", [{}, {"center_rewards_coefficient": 0.3}], ids=["plain", "centered"])
@pytest.mark.parametrize("margins", [False, True])
def test_the_loss_of_a_reward_is_that_of_trl_of_the_pair_alone(build, options, margins):
    rows = [{**row, "margin": 0.5 * number} if margins else row for number, row in enumerate(PAIRS)]
    compare(*build("Reward", classifier(num_labels=1), rows, **options))


# ---- Direct preference optimization ----


@pytest.fixture
def dpo(build):
    return build("DPO", nudged(causal_lm()), PAIRS)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_loss_of_dpo_is_that_of_trl_of_the_pair_alone(dpo, form):
    ours, stock = dpo
    for trainer in dpo:
        for name, value in form.items():
            if name == "discopop_tau":
                setattr(trainer.args, name, value)
            setattr(trainer, "loss_types" if name == "loss_type" else name, value)
        trainer.loss_weights = form.get("loss_weights", [1.0])
    ours.per_example_loss = build_dpo_loss(ours, trl.DPOTrainer)
    compare(ours, stock)


def test_arguments_reach_the_loss(build):
    changes = {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.4, "ld_alpha": 0.2}
    compare(*build("DPO", causal_lm(), PAIRS, **changes))


def test_a_reference_that_is_computed_beforehand_is_that_of_trl(build):
    compare(*build("DPO", causal_lm(), PAIRS, precompute_ref_log_probs=True, ld_alpha=0.3))


def test_every_loss_of_dpo_is_tested_or_refused():
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    assert {*re.findall(r'loss_type == "(\w+)"', source)} == {*LOSSES, "aot", "aot_unpaired"}
    assert {*re.findall(r'f_divergence_type == "(\w+)"', source)} == {
        "reverse_kl",
        *[form["f_divergence_type"] for form in FORMS if "f_divergence_type" in form],
    }


def test_nothing_of_a_pair_is_kept_or_gathered(dpo):
    """The metrics of DPOTrainer's loss are of private rows: they are dropped, and no process waits for another one."""
    ours, _ = dpo
    ours.accelerator.gather = ours.accelerator.gather_for_metrics = lambda value: pytest.fail("gathered")
    ours._set_signature_columns_if_needed()
    ours.per_example_loss(ours.model, collate(ours, list(ours.train_dataset)))
    assert not any(ours._metrics.values())
    kept = ours.per_example_loss._arithmetic._quiet._metrics
    assert {value for of_mode in kept.values() for values in of_mode.values() for value in values} <= {0.0}


def test_hooks_of_trl_that_are_called_have_the_known_signatures():
    names = {
        "_compute_loss": ["self", "model", "inputs", "return_outputs"],
        "compute_ref_log_probs": ["self", "model", "inputs"],
        "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
    }
    for name, parameters in names.items():
        assert list(inspect.signature(getattr(trl.DPOTrainer, name)).parameters) == parameters


# ---- The reference ----


def test_a_reference_that_shares_trained_weights_is_refused():
    model = causal_lm()
    refuse_shared_reference(model, copy.deepcopy(model))
    with pytest.raises(ValueError, match="ref_model: it shares weights with what is trained"):
        refuse_shared_reference(model, copy.copy(model))


def test_what_rows_write_into_a_reference_is_undone():
    model = causal_lm()
    model.register_buffer("seen", torch.zeros(1))
    reference = ModelReference(model)
    model.register_forward_hook(lambda module, args, output: module.seen.add_(1) and None)
    tokens = torch.tensor([[5, 6, 7]])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    reference(model, batch, tokens[:, 1:])
    assert model.seen.item() == 0


@pytest.mark.parametrize("adapter", [None, "ref"])
def test_the_reference_of_an_adapter_computes_without_it_and_trains_what_was_trained(adapter):
    from peft import get_peft_model

    base = causal_lm()
    tokens = torch.tensor([[5, 6, 7]])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = ModelReference(copy.deepcopy(base))(base, batch, tokens[:, 1:])
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    model.add_adapter("ref", config)
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A.default" in name)
    frozen.requires_grad_(False)  # By the user, whom PEFT would overrule.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.add_(0.3)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    reference = AdapterReference(model, adapter=adapter)(model, batch, tokens[:, 1:])
    torch.testing.assert_close(reference, expected)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.active_adapter == "default"
    with switched_adapter(model, adapter):
        assert model.active_adapter == (adapter or "default")


# ---- Supervised fine-tuning ----


TEXTS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_the_loss_of_sft_is_that_of_trl_of_the_row_alone(build, kind):
    compare(*build("SFT", nudged(causal_lm()), TEXTS, loss_type=kind), evaluate=True)


def test_dft_trains_on_a_loss_with_the_gradient_of_that_of_trl(build):
    """Its value would lead elsewhere: TRL holds the weights of the tokens constant, and a difference cannot."""
    ours, stock = build("SFT", nudged(causal_lm()), TEXTS[:1], loss_type="dft")
    gradients = []
    for trainer in (ours, stock):
        trainer._set_signature_columns_if_needed()
        batch = collate(trainer, list(trainer.train_dataset))
        trainer.model.eval()
        loss = ours.per_example_loss if trainer is ours else None
        value = loss(ours.model, batch).sum() if loss else stock.compute_loss(stock.model, batch)
        gradients.append(torch.autograd.grad(value, [*trainer.model.parameters()]))
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0])
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
