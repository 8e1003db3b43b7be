"""Tiny models of several layers, of which the upper half is trained."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel


DECODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
DECODER |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "initializer_range": 0.2}
ENCODER = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 4, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
OPT = {**ENCODER, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
GPT_NEO = {**ENCODER, "num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]], "window_size": 4}
VIT = {**ENCODER, "image_size": 16, "patch_size": 8, "num_labels": 3}

# The name of each class, and the options of its configuration.
CAUSAL = {
    "LlamaForCausalLM": DECODER,
    "Qwen3ForCausalLM": {**DECODER, "head_dim": 8},
    "Gemma3ForCausalLM": {**DECODER, "head_dim": 8, "sliding_window": 4},
    "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 4, "n_head": 2, "vocab_size": 64, "initializer_range": 0.2},
    "OPTForCausalLM": OPT,
    "BloomForCausalLM": {**ENCODER, "n_head": 2, "n_layer": 4},
    "FalconForCausalLM": {**ENCODER, "new_decoder_architecture": False},
    "GPTNeoForCausalLM": GPT_NEO,
    "MambaForCausalLM": {"hidden_size": 16, "num_hidden_layers": 4, "vocab_size": 64, "initializer_range": 0.2},
    "MixtralForCausalLM": {**DECODER, "num_local_experts": 2},
    "GraniteForCausalLM": {**DECODER, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
}
OTHERS = {
    "BertForSequenceClassification": ENCODER,
    "ModernBertForSequenceClassification": {**ENCODER, "local_attention": 4},
    "T5ForConditionalGeneration": T5,
    "ViTForImageClassification": VIT,
}
ARCHITECTURES = CAUSAL | OTHERS


def build_half_trained(architecture: str) -> PreTrainedModel:
    """Return a model with random weights, of whose longest list of layers the upper half is trained."""
    torch.manual_seed(0)
    kind = getattr(hf, architecture)
    model = kind(kind.config_class(**ARCHITECTURES[architecture])).eval()
    model.requires_grad_(False)
    layers = find_layers(model)
    for layer in layers[len(layers) // 2 :]:
        layer.requires_grad_(True)
    return model


def find_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(reversed(lists), key=len))


def build_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    ids = torch.randint(4, 60, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    decoder = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **decoder}


def count_runs(module: torch.nn.Module, evaluate: Callable[[], Any]) -> int:
    """Return how often something inside `module` computes while `evaluate` runs."""
    counted = []
    inner = [part for part in module.modules() if part is not module]
    hooks = [part.register_forward_hook(lambda *_: counted.append(None)) for part in inner]
    evaluate()
    for hook in hooks:
        hook.remove()
    return len(counted)
