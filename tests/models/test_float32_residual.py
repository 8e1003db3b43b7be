"""Bases in few bits with a float32 residual stream: what they compute, and that nothing else about them changes."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    T5Config,
)

from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.output_layer import OutputLayer
from hf_dpzo.models import float32_residual, products
from hf_dpzo.models.fingerprints import fingerprint_frozen
from hf_dpzo.models.float32_residual import Float32Head, Float32Linear, Int8Linear, keep_residual_in_float32
from hf_dpzo.models.precision import describe_loading, describe_reduced_precision
from hf_dpzo.models.products import has_int8_products, is_int8
from hf_dpzo.step.batched_points import BatchedPointsLoss

from support.models import causal_lm, classifier, with_lora


SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HALVES = {f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("layers", "attention_heads")}
ARCHITECTURES = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**SIZES)),
    "gpt2": (AutoModelForCausalLM, GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=2)),
    "opt": (AutoModelForCausalLM, OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    "bloom": (AutoModelForCausalLM, BloomConfig(**SIZES, n_layer=2, n_head=2)),
    "falcon, with its own kind of linear layer": (AutoModelForCausalLM, FalconConfig(**SIZES)),
    "experts": (AutoModelForCausalLM, MixtralConfig(**SIZES, num_local_experts=2)),
    "bert": (AutoModelForMaskedLM, BertConfig(**SIZES)),
    "classifier": (AutoModelForSequenceClassification, BertConfig(**SIZES)),
    "t5": (AutoModelForSeq2SeqLM, T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)),
    "bart": (AutoModelForSeq2SeqLM, BartConfig(vocab_size=32, d_model=32, **HALVES)),
}


def build(name: str) -> PreTrainedModel:
    """Return a model in bfloat16 whose layers all show in its outputs."""
    auto, config = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.bfloat16()


@torch.no_grad()
def evaluate(model: nn.Module) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 4, 3, 3]])}
    inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[5, 6], [7, 8]])
    logits = model(**inputs).logits
    return logits if logits.dim() == 2 else logits[:, :2]  # Without what stands at padding.


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


# ---- What is computed ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_float32_and_as_near_to_a_float32_twin_as_those_of_16_bits_or_nearer(name):
    stock = build(name)
    model, twin = copy.deepcopy(stock), copy.deepcopy(stock).float()
    assert keep_residual_in_float32(model)
    found, expected = evaluate(model), evaluate(twin)
    assert found.dtype == torch.float32
    assert relative(found, expected) < min(0.03, 1.1 * relative(evaluate(stock), expected))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "bart"])
def test_where_a_processor_cannot_multiply_16_bits_outputs_are_those_of_a_float32_twin(name, monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16_products", lambda: False)
    model = build(name)
    twin = copy.deepcopy(model).float()
    assert keep_residual_in_float32(model)
    # Embeddings of BART are scaled in their own type.
    assert relative(evaluate(model), evaluate(twin)) < (1e-2 if name == "bart" else 1e-5)


def test_the_comparison_would_catch_a_missing_layer():
    model = build("llama")
    twin = copy.deepcopy(model).float()
    keep_residual_in_float32(model)
    model.model.layers[1].mlp.forward = torch.zeros_like
    assert relative(evaluate(model), evaluate(twin)) > 0.1


def test_the_stream_between_layers_is_float32():
    model, seen = build("llama"), []
    keep_residual_in_float32(model)
    for layer in [*model.model.layers, model.model.norm]:
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    evaluate(model)
    assert seen == [torch.float32] * 3


def test_label_words_are_scored_by_their_own_weights_in_float32(monkeypatch):
    model, layer = build("llama"), OutputLayer(lambda model, inputs: model(**inputs).logits.float())
    keep_residual_in_float32(model)
    assert isinstance(model.lm_head, Float32Head) and layer.supports(model)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 4, 3, 3]])}
    logits = model(**inputs).logits[:, -1]
    whole = Float32Head.forward

    def evaluate_no_position(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.shape[1] == 0
        return whole(head, hidden)

    monkeypatch.setattr(Float32Head, "forward", evaluate_no_position)
    with torch.no_grad():
        assert torch.allclose(layer.score_words(model, inputs, -1, [3, 4]), logits[:, [3, 4]], rtol=0, atol=1e-5)


def test_adapters_and_a_float32_head_take_float32():
    model, seen = with_lora(classifier(), task="SEQ_CLS"), []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    tokens = {"input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(RuntimeError, match="have the same dtype"):  # Of the base as it was loaded.
        model(**tokens)
    assert keep_residual_in_float32(model)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    model(**tokens)
    assert len(seen) > 4 and {*seen} == {(torch.float32, torch.float32)}


@pytest.mark.skipif(not has_int8_products(), reason="the processor has no products of int8")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_an_int8_base_computes_what_its_unpacked_weights_do(dtype, tolerance):
    torchao = pytest.importorskip("torchao.quantization", reason="it is no dependency")
    model = build("llama").to(dtype)
    torchao.quantize_(
        model,
        torchao.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: type(module) is nn.Linear and "layers" in name,
    )
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear) and is_int8(module.weight):
            module.weight = nn.Parameter(module.weight.dequantize(torch.float32), requires_grad=False)
    twin.float()
    kinds = fingerprint_frozen(model, [])
    assert keep_residual_in_float32(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, Int8Linear)
    assert relative(evaluate(model), evaluate(twin)) < tolerance
    assert fingerprint_frozen(model, []) == kinds
    embedded = torch.randn(1, 3, 32, requires_grad=True)
    model.model.layers[0].mlp(embedded).sum().backward()  # As torchao computes it.
    assert embedded.grad.any()


def test_several_points_in_one_pass_give_the_losses_of_each_alone():
    model = with_lora(build("llama"), task="CAUSAL_LM")
    keep_residual_in_float32(model)
    tokens = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 3]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    loss = CausalLMLoss(model)
    adapter = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    points = {name: torch.stack([values + 0.1, values - 0.1]) for name, values in adapter.items()}
    with torch.no_grad():
        loss(model, inputs)  # The output layer is looked at outside of vmap.
        together = BatchedPointsLoss(loss=loss, parameters=points)(model, inputs)
        for point in range(2):
            for name, values in points.items():
                model.get_parameter(name).copy_(values[point])
            assert torch.allclose(together[:, point], loss(model, inputs), rtol=0, atol=0.05)
    assert (together[:, 0] - together[:, 1]).abs().min() > 0.1


# ---- What stays as it is ----


def test_names_weights_fingerprints_and_what_is_saved_stay_as_they_are(tmp_path):
    """So logs and cards of runs that computed otherwise still fit."""
    model = build("gpt2")
    twin = copy.deepcopy(model)
    keep_residual_in_float32(model)
    assert model.dtype == torch.bfloat16
    assert describe_loading(model) == describe_loading(twin) == {"dtype": "bfloat16"}
    assert describe_reduced_precision(model) == describe_reduced_precision(twin)
    assert fingerprint_frozen(model, []) == fingerprint_frozen(twin, [])
    for name, one in (("new", model), ("stock", twin)):
        one.save_pretrained(tmp_path / name)
    assert (tmp_path / "new/model.safetensors").read_bytes() == (tmp_path / "stock/model.safetensors").read_bytes()
    assert (tmp_path / "new/config.json").read_text() == (tmp_path / "stock/config.json").read_text()


def test_an_adapter_is_saved_and_loaded_onto_either_kind_of_base(tmp_path):
    model = with_lora(build("llama"), task="CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    keep_residual_in_float32(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert {p.dtype for n, p in again.named_parameters() if "lora" in n} == {torch.float32}
    assert keep_residual_in_float32(again)
    assert torch.equal(evaluate(again), evaluate(model))
    merged = model.merge_and_unload()
    assert merged.dtype == torch.bfloat16
    assert relative(evaluate(merged), evaluate(again)) < 0.03


def test_copies_compute_alike():
    model = build("bert")
    keep_residual_in_float32(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(evaluate(again), evaluate(model))
        assert keep_residual_in_float32(again)  # A second time changes nothing.
        assert torch.equal(evaluate(again), evaluate(model))


@pytest.mark.parametrize("make", [causal_lm, classifier, lambda: nn.Linear(2, 2).bfloat16()])
def test_float32_models_and_those_of_other_libraries_are_left_alone(make):
    model = make()
    kinds = [type(module) for module in model.modules()]
    assert not keep_residual_in_float32(model)
    assert [type(module) for module in model.modules()] == kinds


def test_a_model_widened_afterwards_is_its_float32_twin():
    model = build("gpt2")
    twin = copy.deepcopy(model).float()
    keep_residual_in_float32(model)
    assert torch.equal(evaluate(model.float()), evaluate(twin))


class Strict(nn.Module):
    """A layer that takes nothing but bfloat16."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            raise TypeError("not bfloat16")
        return self.layer(x)


class Moved(nn.Module):
    """A layer whose results depend on the type in which it is computed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (1 if x.dtype == torch.bfloat16 else 3)


@pytest.mark.parametrize("kind", [Strict, Moved])
def test_a_model_that_fails_or_moves_in_float32_computes_as_it_was_loaded(kind):
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = kind(layer.mlp)
    stock = copy.deepcopy(model)
    assert not keep_residual_in_float32(model)
    assert torch.equal(evaluate(model), evaluate(stock))
    assert not any(isinstance(module, Float32Linear | Float32Head) for module in model.modules())


@pytest.mark.parametrize(
    ("moved", "is_near"),
    [
        ([], True),
        ([(0, 1), (1, 2), (2, 2)], True),
        ([(row, place) for row in range(3) for place in range(1, 5)], False),
    ],
    ids=["rounding", "some places", "all but the first of each row"],
)
def test_places_that_16_bits_round_to_something_else_hide_no_layer_that_computes_something_else(moved, is_near):
    """SmolLM2 in bfloat16 rounds some places of made-up tokens to outputs that are far from the right ones."""
    torch.manual_seed(0)
    stock = torch.randn(3, 5, 32)
    changed = stock * (1 + 0.02 * torch.randn(3, 5, 32))
    for row, place in moved:
        changed[row, place] = torch.randn(32)
    assert float32_residual._is_near(stock, changed) == is_near


def test_mamba_is_left_alone():
    """Its mixers multiply by the weights of their linear layers themselves."""
    model = AutoModelForCausalLM.from_config(MambaConfig(**SIZES)).bfloat16()
    assert not keep_residual_in_float32(model)
