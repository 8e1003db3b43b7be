"""The output layer is evaluated in parts to the same losses, and only where the model computes nothing more."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch.func import functional_call, vmap
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.output_layer import (
    POSITIONS_PER_CHUNK,
    OutputLayer,
    _compute_losses,
    _is_cut,
    _row_loss,
    find_output_layer,
)
from hf_dpzo.losses.prompting import MaskedWordLoss, NextWordLoss
from hf_dpzo.models.float32_residual import Float32Head
from hf_dpzo.models.products import WORDS_PER_CHUNK

from support.models import causal_lm, llama_config, masked_lm


MASK, WORDS, TOKENS = 2, (44, 45), 9
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LORA = {
    "llama": ["q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "gemma2": ["q_proj"],
    "cohere": ["q_proj"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
}
HEADS = {"llama": "lm_head", "bert": "decoder", "roberta": "decoder"}


def opt(**changes):
    sizes = {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(**SIZES | sizes | changes))


def gpt2(**changes):
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, **changes))


def gemma2(**changes):
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, **changes))


def cohere(**changes):
    return CohereForCausalLM(CohereConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, **changes))


def roberta(**changes):
    return RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=64, **changes))


def distilbert(**changes):
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=64, **sizes, **changes))


MODELS = {
    "llama": causal_lm,
    "opt": opt,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "cohere": cohere,
    "bert": masked_lm,
    "roberta": roberta,
    "distilbert": distilbert,
}
MASKED = ("bert", "roberta", "distilbert")
# These cap or scale their logits.
WHOLE = ("gemma2", "cohere")


def build_model(name, wrap="plain", **changes):
    model = MODELS[name](**changes)
    if wrap == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=LORA[name], fan_in_fan_out=name == "gpt2"))
    if wrap == "lora on the head":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=[*LORA[name], HEADS[name]]))
    if wrap == "saved head":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=LORA[name], modules_to_save=[HEADS[name]]))
    for parameter in model.parameters():  # A new adapter is zero, and a new model nearly so.
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(rows=4):
    """Return left-padded rows with a mask near their end, and targets at the last tokens of all but the first row."""
    ids = torch.randint(4, 40, (rows, TOKENS))
    ids[:, -3] = MASK
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, :row], mask[row, :row] = 0, 0
    targets = ids.masked_fill(torch.arange(TOKENS) < 5, -100)
    targets[0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": targets}


def losses_of(name, model):
    """Return each loss that fits the model, with its inputs."""
    inputs, classes = batch(), torch.tensor([0, 1, 1, 0])
    prompted = {**inputs, "labels": classes}
    if name in MASKED:
        return [(MaskedWordLoss(words=WORDS, mask_token_id=MASK, model=model), prompted)]
    return [(NextWordLoss(words=WORDS, model=model), prompted), (CausalLMLoss(model), inputs)]


def from_all_logits(loss, model, inputs, monkeypatch):
    """Return losses computed from all logits of all positions."""
    with monkeypatch.context() as patch:
        patch.setattr(OutputLayer, "supports", lambda layer, model: False)
        return loss(model, inputs)


CASES = [(name, wrap) for name in MODELS for wrap in ("plain", "lora")]
CASES += [(name, wrap) for name in HEADS for wrap in ("lora on the head", "saved head")]


@torch.no_grad()
@pytest.mark.parametrize(("name", "wrap"), CASES)
def test_losses_in_parts_equal_those_from_all_logits(name, wrap, monkeypatch):
    model = build_model(name, wrap)
    for loss, inputs in losses_of(name, model):
        expected = from_all_logits(loss, model, inputs, monkeypatch)
        torch.testing.assert_close(loss(model, inputs), expected, rtol=1e-5, atol=1e-5)
        assert loss._output_layer.supports(model) == (name not in WHOLE)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_are_read_when_they_are_used(name, tied, monkeypatch):
    model = build_model(name, tie_word_embeddings=tied)
    assert (find_output_layer(model).weight is model.get_input_embeddings().weight) == tied
    for loss, inputs in losses_of(name, model):
        before = loss(model, inputs)
        model.get_input_embeddings().weight.add_(0.5 * torch.randn_like(model.get_input_embeddings().weight))
        after = loss(model, inputs)
        assert not torch.allclose(before, after, rtol=1e-3)
        torch.testing.assert_close(after, from_all_logits(loss, model, inputs, monkeypatch), rtol=1e-5, atol=1e-5)


def record_logit_shapes(loss, model, inputs):
    """Return the shapes of what the output layer and the model return."""
    seen = []
    handles = [
        find_output_layer(model).register_forward_hook(lambda layer, args, output: seen.append(output.shape)),
        model.register_forward_hook(lambda model, args, output: seen.append(output.logits.shape)),
    ]
    loss(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_model_computes_no_logits(name):
    model = build_model(name)
    for loss, inputs in losses_of(name, model):
        loss(model, inputs)  # Finds out.
        assert record_logit_shapes(loss, model, inputs) == [(4, 0, 64), (4, 0, 64)]
        assert not find_output_layer(model)._forward_pre_hooks


@torch.no_grad()
def test_evaluation_returns_all_logits():
    model, inputs = build_model("llama"), batch()
    losses, scores = CausalLMLoss(model).evaluate(model, inputs)
    assert scores.shape == (4, TOKENS, 64)
    torch.testing.assert_close(losses, CausalLMLoss(model)(model, inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_target_losses_do_not_depend_on_other_rows_by_a_single_bit():
    """A product of many positions may round differently from one of few."""
    model = build_model("llama")
    whole = batch(8)
    # No row is moved by its neighbours' padding; what is left is the output layer.
    layer = OutputLayer(lambda model, inputs: model(inputs_embeds=inputs["hidden"]).logits)
    hidden = {"hidden": torch.randn(8, TOKENS, 16), "input_ids": whole["input_ids"]}
    model.model.layers, model.model.norm = torch.nn.ModuleList(), torch.nn.Identity()
    targets = whole["labels"][:, 1:]
    together = layer.compute_target_losses(model, hidden, targets)
    for row in range(8):
        alone = {name: value[[row]] for name, value in hidden.items()}
        assert torch.equal(layer.compute_target_losses(model, alone, targets[[row]])[0], together[row])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_that_are_unpacked_once_for_all_rows_give_the_bits_of_each_row_alone(dtype, bias):
    head = torch.nn.Linear(16, 2 * WORDS_PER_CHUNK + 70, bias=bias).to(dtype)
    head.__class__ = Float32Head if dtype == torch.bfloat16 else torch.nn.Linear
    hidden, targets = torch.randn(5, TOKENS, 16), torch.randint(2 * WORDS_PER_CHUNK, (5, TOKENS))
    positions = [torch.arange(count) for count in (TOKENS, 3, 1, 0, 2)]
    assert _is_cut(head)
    found = _compute_losses(head, hidden, targets, positions, range(5))
    parts = zip(hidden, targets, positions, strict=True)
    assert torch.equal(found, torch.stack([_row_loss(head, *part) for part in parts]))


@torch.no_grad()
def test_rows_longer_than_a_chunk_have_the_losses_from_all_logits(monkeypatch):
    model = build_model("llama", max_position_embeddings=512)
    ids = torch.randint(4, 40, (2, 2 * POSITIONS_PER_CHUNK + 3))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    loss = CausalLMLoss(model)
    torch.testing.assert_close(
        loss(model, inputs), from_all_logits(loss, model, inputs, monkeypatch), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("label", [64, -5])
def test_a_target_outside_the_vocabulary_raises_as_it_does_with_all_logits(label, monkeypatch):
    model, inputs = build_model("llama"), batch()
    loss = CausalLMLoss(model)
    assert torch.isfinite(loss(model, inputs)).all()
    inputs["labels"][2, -1] = label
    for evaluate in (loss, lambda *given: from_all_logits(loss, *given, monkeypatch)):
        with pytest.raises(IndexError, match="out of bounds"):
            evaluate(model, inputs)


@torch.no_grad()
def test_virtual_tokens_in_front_have_no_losses(monkeypatch):
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model = get_peft_model(causal_lm(), config).eval()
    for loss, inputs in losses_of("llama", model):
        expected = from_all_logits(loss, model, inputs, monkeypatch)
        torch.testing.assert_close(loss(model, inputs), expected, rtol=1e-5, atol=1e-5)
        assert loss._output_layer.supports(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_16_bit_models_have_float32_losses_close_to_those_from_all_logits(name, monkeypatch):
    model = build_model(name).to(torch.bfloat16)
    for loss, inputs in losses_of(name, model):
        expected = from_all_logits(loss, model, inputs, monkeypatch)
        assert loss._output_layer.supports(model)
        assert loss(model, inputs).dtype == torch.float32
        torch.testing.assert_close(loss(model, inputs), expected, rtol=0.02, atol=0.02)


# ---- Models that are more than their output layer ----


class Joined(torch.nn.Linear):
    """A head that adds to each row the mean over all rows."""

    def forward(self, hidden):
        logits = super().forward(hidden)
        return logits + logits.mean(dim=0, keepdim=True)


class Shifted(torch.nn.Linear):
    """A head that adds to each token the logits of the one before."""

    def forward(self, hidden):
        return super().forward(hidden) + (super().forward(hidden.roll(1, dims=1)) if hidden.ndim == 3 else 0)


class Recentred(LlamaForCausalLM):
    """A model that subtracts the mean over the batch from its logits, behind the head."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits = outputs.logits - outputs.logits.mean(dim=0, keepdim=True)
        return outputs


class Needy(LlamaForCausalLM):
    """A model that looks at its last logits."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        assert outputs.logits[0, -1].shape == (64,)
        return outputs


def with_head(kind):
    model = causal_lm()
    model.lm_head = kind(16, 64, bias=False)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "model",
    [
        lambda: with_head(Joined),
        lambda: with_head(Shifted),
        lambda: Recentred(llama_config()).eval(),
        lambda: Needy(llama_config()).eval(),
    ],
    ids=["rows joined in the head", "tokens joined in the head", "rows joined behind the head", "logits looked at"],
)
def test_all_logits_are_computed_where_they_depend_on_more_than_one_position(model, monkeypatch):
    model, inputs = model(), batch()
    loss = CausalLMLoss(model)
    assert torch.equal(loss(model, inputs), from_all_logits(loss, model, inputs, monkeypatch))
    assert not loss._output_layer.supports(model)


@torch.no_grad()
def test_a_replaced_head_is_examined_again(monkeypatch):
    model, inputs = causal_lm(), batch()
    loss = CausalLMLoss(model)
    loss(model, inputs)
    model.lm_head = Joined(16, 64, bias=False)
    assert torch.equal(loss(model, inputs), from_all_logits(loss, model, inputs, monkeypatch))


def test_examining_a_model_draws_nothing_and_keeps_its_modes():
    model = build_model("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    assert OutputLayer(lambda model, inputs: model(**inputs).logits).supports(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes


# ---- Several models at once ----


class Evaluated(torch.nn.Module):
    """A loss as a module, whose parameters are the model's."""

    def __init__(self, loss, model):
        super().__init__()
        self.loss, self.model = loss, model

    def forward(self, inputs):
        return self.loss(self.model, inputs)


def attending(name, attention):
    config = {"_attn_implementation": attention}
    if name == "bert":
        return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=64, pad_token_id=0, **config))
    return causal_lm(**config)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_several_adapters_at_once_have_the_losses_of_each_alone(name, attention, head):
    targets = [*LORA[name], HEADS[name]] if head else LORA[name]
    model = get_peft_model(attending(name, attention), LoraConfig(r=2, target_modules=targets)).eval()
    for loss, inputs in losses_of(name, model):
        loss(model, inputs)  # Finds out.
        whole = Evaluated(loss, model)
        trained = {key: value for key, value in whole.named_parameters() if value.requires_grad}
        several = {key: value + 0.2 * torch.randn(3, *value.shape) for key, value in trained.items()}
        together = vmap(lambda adapter: functional_call(whole, adapter, (inputs,)))(several)  # noqa: B023
        for index in range(3):
            for key, value in trained.items():
                value.copy_(several[key][index])
            torch.testing.assert_close(together[index], loss(model, inputs), rtol=1e-5, atol=1e-5)
