"""Models and losses that join the rows of a batch are caught, and those that do not are left alone."""

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    default_data_collator,
)

from hf_dpzo.isolation.probe import CoupledRowsError, probe_isolation
from hf_dpzo.isolation.synthetic_rows import generate_probe_rows
from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.heads import as_loss
from hf_dpzo.losses.prompting import Prompt
from hf_dpzo.models.unwrap import drop_labels

from support.models import causal_lm, classifier, llama_config, masked_lm, with_lora
from support.rows import labelled_rows


CLASSES = labelled_rows(2)
TEXTS = Dataset.from_list([{"input_ids": [5], "attention_mask": [1], "labels": [5]}])


def pipeline(model, collate, loss=None, micro_batch_size=64):
    """Return a function from rows to losses, as training has it."""
    loss = as_loss(loss, model)

    def evaluate(rows):
        pieces = [rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)]
        return torch.cat([loss(model, dict(collate(piece))) for piece in pieces])

    return evaluate


def probed(model, tokenizer, loss=None, *, dataset=CLASSES, side="left", micro_batch_size=64):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    collate = (DataCollatorForSeq2Seq if dataset is TEXTS else DataCollatorWithPadding)(tokenizer)
    rows = generate_probe_rows(dataset, model)
    return probe_isolation(model, pipeline(model, collate, loss, micro_batch_size), rows)


# ---- Sound models ----


def prompted(model, template, tokenizer, *words):
    return model, Prompt(template=template, label_words=words).loss(model, tokenizer)


def regression(tokenizer):
    return LlamaForSequenceClassification(llama_config(num_labels=1, problem_type="regression")).eval(), None


SOUND = {
    "classifier": lambda tokenizer: (classifier(), None),
    "regression": regression,
    "adapter": lambda tokenizer: (with_lora(classifier()), None),
    "next word": lambda tokenizer: prompted(causal_lm(), "{text} :", tokenizer, "bad", "good"),
    "label strings": lambda tokenizer: prompted(causal_lm(), "{text} :", tokenizer, "very bad", "good"),
    "mask": lambda tokenizer: prompted(masked_lm(), "{text} {mask}", tokenizer, "bad", "good"),
}


@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
@pytest.mark.parametrize("name", SOUND)
def test_sound_models_move_by_rounding_alone(tokenizer, name, micro_batch_size):
    model, loss = SOUND[name](tokenizer)
    side = "right" if name == "mask" else "left"
    isolation = probed(model, tokenizer, loss, side=side, micro_batch_size=micro_batch_size)
    assert isolation.loss_change < 1e-5
    assert isolation.is_bitwise or micro_batch_size > 1


def test_fixed_physical_shapes_keep_losses_equal_to_the_last_bit(tokenizer):
    """All rows are padded to one public length, and each micro-batch is filled up with dummy rows."""
    model = classifier()
    collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=24)
    evaluate = pipeline(model, collate, micro_batch_size=4)
    dummy = {"input_ids": [4], "attention_mask": [1], "labels": 0}
    rows = generate_probe_rows(CLASSES, model)
    assert probe_isolation(
        model, lambda some: evaluate([*some, *[dummy] * (-len(some) % 4)])[: len(some)], rows
    ).is_bitwise


def mixture(**changes):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **changes)).eval()


def prompt_tuned():
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    return get_peft_model(causal_lm(), config).eval()


@pytest.mark.parametrize("make", [causal_lm, mixture, prompt_tuned])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
def test_sound_language_models_move_by_rounding_alone(tokenizer, make, micro_batch_size):
    isolation = probed(make(), tokenizer, dataset=TEXTS, side="right", micro_batch_size=micro_batch_size)
    assert isolation.loss_change < 1e-5
    assert isolation.is_bitwise or micro_batch_size > 1


# ---- Layers that join rows ----


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class CentredInPlace(nn.Module):
    def forward(self, x):
        return x.sub_(x.mean(0))


class AlwaysBatchStatistics(nn.BatchNorm1d):
    """A layer whose exact type is not BatchNorm1d, and which does the same in both modes."""

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True)


class OfTokens(nn.Module):
    """Applies a normalization of `[batch, features, tokens]` to `[batch, tokens, features]`."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class QuantizedByTheBatch(nn.Module):
    """Rounds activations to 3 bits with one scale for the whole tensor."""

    def forward(self, x):
        scale = x.abs().amax() / 3
        return (x / scale).round() * scale


class RunningMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        self.mean.mul_(0.5).add_(x.mean((0, 1)), alpha=0.5)
        return x - self.mean


class Counter(nn.Module):
    """Moves no loss, and yet reveals the number of rows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x):
        self.rows = self.rows + len(x)
        return x


def classifier_with(layer):
    """Return a classifier with `layer` behind its first MLP, and a head that is large enough to show its effect."""
    model = classifier()
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, layer)
    nn.init.normal_(model.score.weight)
    return model.eval()


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (Centred(), r"model\.layers\.0\.mlp\.1 \(Centred\)"),
        (CentredInPlace(), r"model\.layers\.0\.mlp\.1 \(CentredInPlace\)"),
        (OfTokens(nn.BatchNorm1d(16, track_running_stats=False)), r"model\.layers\.0\.mlp\.1\.norm \(BatchNorm1d\)"),
        (OfTokens(AlwaysBatchStatistics(16)), r"model\.layers\.0\.mlp\.1\.norm \(AlwaysBatchStatistics\)"),
        (QuantizedByTheBatch(), r"model\.layers\.0\.mlp\.1 \(QuantizedByTheBatch\)"),
    ],
)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_layer_that_joins_rows_is_caught_by_name(tokenizer, layer, name, adapter):
    model = classifier_with(layer)
    model = with_lora(model).eval() if adapter else model
    message = (
        rf"^isolation: replacing the other rows of a batch moved a row's loss by [\d.e-]+, first in module \S*{name};"
    )
    with pytest.raises(CoupledRowsError, match=message):
        probed(model, tokenizer)


def test_running_statistics_join_no_rows(tokenizer):
    assert probed(classifier_with(OfTokens(nn.BatchNorm1d(16))), tokenizer).loss_change < 1e-5


def test_micro_batches_of_one_row_are_not_coupled(tokenizer):
    assert probed(classifier_with(Centred()), tokenizer, micro_batch_size=1).is_bitwise


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_is_caught(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = torch.ao.quantization.quantize_dynamic(classifier(), {nn.Linear}, dtype=torch.qint8)
            model(torch.tensor([[5, 6]]))
        except (AttributeError, RuntimeError):
            pytest.skip("this build of torch has no dynamic quantization")
        with pytest.raises(CoupledRowsError, match=r"first in module .*\(Linear\)"):
            probed(model, tokenizer)


def test_a_layer_that_keeps_a_state_is_caught(tokenizer):
    model = classifier_with(RunningMean())
    with pytest.raises(CoupledRowsError, match=r"the same batch again moved .*\.mlp\.1 \(RunningMean\); keep nothing"):
        probed(model, tokenizer)
    assert not model.model.layers[0].mlp[1].mean.any()


def test_a_buffer_that_changes_is_caught_and_put_back(tokenizer):
    model = classifier_with(Counter())
    with pytest.raises(CoupledRowsError, match=r"changed model\.layers\.0\.mlp\.1\.rows"):
        probed(model, tokenizer)
    assert model.model.layers[0].mlp[1].rows == 0


def gpt2():
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=1)).eval()


def last_token_loss(model, inputs):
    """Call the model without positions, which then count left padding."""
    logits = model(**drop_labels(inputs)).logits[:, -2]
    return nn.functional.cross_entropy(logits, inputs["labels"][:, -1], reduction="none")


def test_positions_that_count_padding_are_caught(tokenizer):
    message = r"lengthening another row .* first in module transformer \(GPT2Model\); pass position_ids"
    with pytest.raises(CoupledRowsError, match=message):
        probed(gpt2(), tokenizer, last_token_loss, dataset=TEXTS)
    assert probed(gpt2(), tokenizer, dataset=TEXTS, side="right").loss_change < 1e-5


def test_virtual_tokens_in_front_of_padding_are_caught(tokenizer):
    """The longer the padding between them and a row's own tokens, the farther they are away."""
    model = prompt_tuned()
    for weight in (parameter for parameter in model.parameters() if parameter.ndim == 2):
        weight.data.mul_(10)
    with pytest.raises(
        CoupledRowsError, match=r"lengthening another row of a batch moved a row's loss by [\d.]+; pass"
    ):
        probed(model, tokenizer, last_token_loss, dataset=TEXTS)


# ---- Losses that join rows ----


def with_router_loss(model, inputs):
    outputs = model(**drop_labels(inputs))
    return CausalLMLoss(model).losses(outputs.logits, inputs) + outputs.aux_loss


def the_models_own(model, inputs):
    return model(**inputs).loss.expand(len(inputs["input_ids"]))


def over_all_tokens(model, inputs):
    """Divide by the number of targets of the batch."""
    targets = (inputs["labels"] != -100).sum(dim=1)
    return CausalLMLoss(model)(model, inputs) * targets / targets.sum()


@pytest.mark.parametrize("loss", [with_router_loss, the_models_own, over_all_tokens])
def test_a_loss_that_joins_rows_is_caught(tokenizer, loss):
    model = mixture(output_router_logits=True, router_aux_loss_coef=1.0)
    with pytest.raises(CoupledRowsError, match=r"but no module's output .* so per_example_loss joins rows"):
        probed(model, tokenizer, loss, dataset=TEXTS, side="right")


def test_a_loss_that_depends_on_the_place_in_the_batch_is_caught(tokenizer):
    model = classifier()
    evaluate = pipeline(model, DataCollatorWithPadding(tokenizer))
    with pytest.raises(CoupledRowsError, match="permuting a batch"):
        probe_isolation(
            model, lambda rows: evaluate(rows) + torch.arange(len(rows)), generate_probe_rows(CLASSES, model)
        )


@pytest.mark.parametrize("point", [0, 1, 2])
def test_a_loss_that_depends_on_its_neighbours_at_one_point_alone_is_caught(tokenizer, point):
    model = classifier()
    evaluate = pipeline(model, DataCollatorWithPadding(tokenizer))

    def at_points(rows):
        return evaluate(rows)[:, None].repeat(1, 3)

    def coupled(rows):
        losses = at_points(rows)
        losses[:, point] += losses[:, point].mean()
        return losses

    rows = generate_probe_rows(CLASSES, model)
    assert probe_isolation(model, at_points, rows).loss_change < 1e-5
    with pytest.raises(CoupledRowsError):
        probe_isolation(model, coupled, rows)


# ---- Other rows ----


def test_two_public_rows_are_enough(tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8, 9], "labels": 0}]
    collate = DataCollatorWithPadding(tokenizer)
    sound, coupled = classifier(), classifier_with(Centred())
    assert probe_isolation(sound, pipeline(sound, collate), rows).loss_change < 1e-5
    with pytest.raises(CoupledRowsError, match=r"\(Centred\)"):
        probe_isolation(coupled, pipeline(coupled, collate), rows)
    with pytest.raises(ValueError, match="probe_rows=1: a row needs neighbours"):
        probe_isolation(sound, pipeline(sound, collate), rows[:1])


@pytest.mark.parametrize("as_list", [False, True])
def test_models_of_features_are_probed_too(as_list):
    features = torch.arange(24.0).view(4, 6).cos()
    rows = [{"x": row.tolist() if as_list else row, "labels": 1} for row in features]

    def squares(model, inputs):
        return model(inputs["x"]).square().mean(dim=1)

    sound = nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3))
    coupled = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False))
    only_nan = nn.Sequential(nn.Linear(6, 3), NanIsShared())
    assert probe_isolation(sound, pipeline(sound, default_data_collator, squares), rows).loss_change < 1e-5
    with pytest.raises(CoupledRowsError, match=r"replacing .* first in module 1 \(BatchNorm1d\)"):
        probe_isolation(coupled, pipeline(coupled, default_data_collator, squares), rows)
    with pytest.raises(CoupledRowsError, match=r"making the other rows of a batch NaN .* first in module 1 \(NanIs"):
        probe_isolation(only_nan, pipeline(only_nan, default_data_collator, squares), rows)


class NanIsShared(nn.Module):
    def forward(self, x):
        return x + 0 * x.sum()


def test_nan_in_the_embeddings_of_other_rows_is_caught(tokenizer):
    with pytest.raises(CoupledRowsError, match=r"NaN moved a row's loss by nan, first in module .* \(NanIsShared\)"):
        probed(classifier_with(NanIsShared()), tokenizer)


# ---- What else the probe guarantees ----


def fails(model, inputs):
    raise KeyError("a column that is missing")


def one_number(model, inputs):
    return model(**drop_labels(inputs)).logits.mean()


def not_finite(model, inputs):
    return model(**drop_labels(inputs)).logits[:, 0] / 0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (fails, "KeyError: 'a column that is missing'; correct the loss or the collator, or pass probe_rows"),
        (not_finite, "a public row has the loss .*inf; pass probe_rows"),
    ],
)
def test_a_loss_that_fails_on_public_rows_is_reported_with_a_remedy(tokenizer, loss, message):
    with pytest.raises(ValueError, match=message) as caught:
        probed(classifier(), tokenizer, loss)
    assert not isinstance(caught.value, CoupledRowsError)


def test_one_loss_for_a_batch_is_refused(tokenizer):
    model = classifier()
    rows = generate_probe_rows(CLASSES, model)
    with pytest.raises(ValueError, match=r"one loss for each row, shape \[batch\]"):
        probe_isolation(model, lambda rows: one_number(model, DataCollatorWithPadding(tokenizer)(rows)), rows)


@pytest.mark.parametrize("loss", [None, fails])
def test_the_model_the_rows_and_the_generator_stay_unchanged(tokenizer, loss):
    model = classifier().train()
    model.model.norm.eval()
    rows = generate_probe_rows(CLASSES, model)
    given, state = copy.deepcopy(rows), torch.get_rng_state()
    evaluate = pipeline(model, DataCollatorWithPadding(tokenizer), loss)

    def taking_fields_out(batch):
        assert not model.training
        assert not torch.is_grad_enabled()
        losses = evaluate(batch)
        for row in batch:
            row.clear()
        return losses

    try:
        probe_isolation(model, taking_fields_out, rows)
    except ValueError:
        assert loss is fails
    assert model.training
    assert not model.model.norm.training
    assert rows == given
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
