"""What becomes of the fields that TRL's configurations add."""

import re
from dataclasses import dataclass

import pytest
import trl
from transformers import TrainingArguments

from hf_dpzo import ZOTrainingArguments
from hf_dpzo.arguments.joined import JOINED_FIELDS, list_added_fields, refuse_unread_loss_fields
from hf_dpzo.trl import ZODPOConfig, ZORewardConfig, ZOSFTConfig


READY = {"SFTConfig": ZOSFTConfig, "RewardConfig": ZORewardConfig, "DPOConfig": ZODPOConfig}
# A value other than the default, for each field that is refused.
REFUSED = {
    "activation_offloading": True,
    "packing": True,
    "padding_free": True,
    "eval_packing": True,
    "router_aux_loss_coef": 0.1,
    "precompute_ref_batch_size": 4,
    "use_weighting": True,
    "sync_ref_model": True,
}
# Of the stock arguments that these configurations declare again, those that are refused.
OF_STOCK = {"use_liger_kernel": True, "label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
COMMON = {"noise_multiplier": 1.0, "target_delta": 1e-4, "report_to": "none", "use_cpu": True}


@pytest.fixture
def make(tmp_path):
    return lambda kind, **changes: READY[kind](str(tmp_path), **COMMON, **changes)


@pytest.mark.parametrize("kind", READY)
def test_each_field_that_trl_adds_is_in_exactly_one_class(kind):
    """A version of TRL that adds a field fails here, until somebody has read what it does."""
    fields = JOINED_FIELDS[kind]
    classes = [fields.prepares, fields.loss, {*fields.refused}, fields.unread]
    assert {*list_added_fields(getattr(trl, kind))} == fields.known
    assert sum(map(len, classes)) == len(fields.known)


@pytest.mark.parametrize("kind", READY)
def test_stock_fields_that_trl_declares_again_are_known(kind):
    """Their defaults are those of stock's arguments, because these come first."""
    again = {*getattr(trl, kind).__annotations__, *getattr(trl, kind).__mro__[1].__annotations__}
    of_stock = again & {*TrainingArguments.__dataclass_fields__}
    assert of_stock == {
        "logging_steps",
        "gradient_checkpointing",
        "bf16",
        "lr_scheduler_kwargs",
        "use_liger_kernel",
        "torch_empty_cache_steps",
        "learning_rate",
    }
    for name in of_stock - {"learning_rate", "logging_steps"}:
        declared = READY[kind].__dataclass_fields__[name].default
        assert declared == TrainingArguments.__dataclass_fields__[name].default


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, fields in JOINED_FIELDS.items() for name in fields.refused]
)
def test_a_field_that_would_be_ignored_is_refused_by_name(make, kind, name):
    with pytest.raises(ValueError, match=rf"^{name}={REFUSED[name]}: .*(remove it|set 0)\.$"):
        make(kind, **{name: REFUSED[name]})


@pytest.mark.parametrize("kind", READY)
@pytest.mark.parametrize("name", OF_STOCK)
def test_a_field_of_stock_is_refused_here_too(make, kind, name):
    with pytest.raises(ValueError, match=rf"^{name}={OF_STOCK[name]}: "):
        make(kind, **{name: OF_STOCK[name]})


def test_no_weight_of_experts_is_accepted(make):
    assert make("SFTConfig", router_aux_loss_coef=0.0).router_aux_loss_coef == 0


@pytest.mark.parametrize("kinds", [["aot"], ["sigmoid", "aot_unpaired"]])
def test_a_loss_that_sorts_the_pairs_of_a_batch_is_refused(make, kinds):
    with pytest.raises(ValueError, match=rf"^loss_type={re.escape(str(kinds))}: .* sort the .* choose sigmoid"):
        make("DPOConfig", loss_type=kinds)


def test_a_field_that_is_not_known_may_only_keep_its_default(make, monkeypatch):
    """As one that a later version of TRL adds."""
    known = JOINED_FIELDS["RewardConfig"]
    monkeypatch.setitem(
        JOINED_FIELDS,
        "RewardConfig",
        type(known)(prepares=known.prepares, loss=frozenset(), refused=known.refused),
    )
    make("RewardConfig")
    with pytest.raises(ValueError, match=r"^center_rewards_coefficient=0.1: this version of hf_dpzo does not know"):
        make("RewardConfig", center_rewards_coefficient=0.1)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("SFTConfig", "loss_type", "dft"),
        ("RewardConfig", "center_rewards_coefficient", 0.1),
        ("DPOConfig", "beta", 0.2),
        ("DPOConfig", "loss_type", ["hinge"]),
    ],
)
def test_a_field_of_the_loss_is_refused_where_another_loss_replaces_that(make, kind, name, value):
    refuse_unread_loss_fields(make(kind))
    with pytest.raises(ValueError, match=rf"^{name}=.*: per_example_loss replaces the loss that reads it"):
        refuse_unread_loss_fields(make(kind, **{name: value}))


def test_a_configuration_that_is_joined_by_hand_obeys_the_same_rules(tmp_path):
    joined = dataclass(type("Joined", (ZOTrainingArguments, trl.SFTConfig), {}))
    with pytest.raises(ValueError, match=r"^activation_offloading=True: "):
        joined(str(tmp_path), **COMMON, activation_offloading=True)
