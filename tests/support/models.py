"""Tiny models, built from config classes, and a tokenizer of some words."""

import functools

import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)


WORDS = [f"w{i}" for i in range(40)] + ["bad", "good", "very", ":"]


@functools.cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", "[EOS]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        eos_token="[EOS]",
        padding_side="left",
    )


def llama_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "num_labels": 2,
    }
    return LlamaConfig(**{**sizes, **changes})


def classifier(**changes) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(llama_config(**changes)).eval()


def causal_lm(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(**changes)).eval()


def one_layer(**changes) -> LlamaForSequenceClassification:
    """The classifier for tests that make many runs, to which a second layer adds nothing but time."""
    return classifier(num_hidden_layers=1, **changes)


def masked_lm() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    ).eval()


def with_lora(model: torch.nn.Module, task: TaskType = TaskType.SEQ_CLS) -> torch.nn.Module:
    return get_peft_model(model, LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"]))
