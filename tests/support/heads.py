"""A tiny model of each kind of head, rows for it, and the collator that its users pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as hf
from transformers import PreTrainedModel

from support.models import word_tokenizer


BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 3,
    "pad_token_id": 0,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "num_labels": 3}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
LAYERS |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0, "eos_token_id": 3}
LAYERS |= {"bos_token_id": 2, "vocab_size": 64, "num_labels": 3}
BART = {**LAYERS, "decoder_start_token_id": 3, "max_position_embeddings": 64}
WHISPER = {**LAYERS, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
WHISPER |= {"decoder_start_token_id": 4, "classifier_proj_size": 8, "begin_suppress_tokens": None}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
VIT |= {"image_size": 16, "patch_size": 8}
WAV2VEC2 = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
WAV2VEC2 |= {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
WAV2VEC2 |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
WAV2VEC2 |= {"num_labels": 3, "vocab_size": 32, "feat_extract_norm": "layer", "conv_bias": True, "pad_token_id": 0}
SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 8], "num_labels": 3}
SEGFORMER |= {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 1], "mlp_ratios": [1, 1]}
SEGFORMER |= {"decoder_hidden_size": 8, "image_size": 16}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}


@dataclass(frozen=True, kw_only=True)
class HeadCase:
    """A kind of head.

    Args:
        architecture: the name of the model's class.
        sizes: the options of its configuration.
        row: a function from a row's number to the row.
        collator: a function that returns the collator.
        loss: the name of its loss.
    """

    architecture: str
    sizes: dict[str, Any]
    row: Callable[[int], dict[str, Any]]
    collator: Callable[[], Callable[[list], Any]]
    loss: str

    def model(self, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        kind = getattr(hf, self.architecture)
        return kind(kind.config_class(**{**self.sizes, **changes})).eval()

    def rows(self, count: int) -> list[dict[str, Any]]:
        return [self.row(number) for number in range(count)]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.collator()([dict(row) for row in rows]))


def tokens(number: int) -> list[int]:
    """A text of three to five words and its end."""
    return [5 + (number * 7 + place) % 40 for place in range(3 + number % 3)] + [3]


def text(number: int, **labels: Any) -> dict[str, Any]:
    ids = tokens(number)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), **labels}


def choices(number: int) -> dict[str, Any]:
    texts = [tokens(number), tokens(number + 1)]
    return {"input_ids": texts, "attention_mask": [[1] * len(one) for one in texts], "labels": number % 2}


def numbers(number: int, *shape: int) -> list:
    return np.random.default_rng(number).random(shape, dtype=np.float32).tolist()


def image(number: int, **labels: Any) -> dict[str, Any]:
    return {"pixel_values": numbers(number, 3, 16, 16), **labels}


def map_of_classes(number: int) -> list:
    return np.random.default_rng(number).integers(0, 3, (16, 16)).tolist()


def token_classes(number: int) -> list[int]:
    return [-100, *(place % 3 for place in range(len(tokens(number)) - 1))]


def masked(number: int) -> list[int]:
    return [-100, 7, *[-100] * (len(tokens(number)) - 2)]


def stack_fields(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator for rows of one shape."""
    stacked = {name: torch.tensor(np.array([row[name] for row in rows])) for name in rows[0]}
    return {name: value.float() if value.is_floating_point() else value for name, value in stacked.items()}


def right_padded(collator: type, **options: Any) -> Callable[[], Callable[[list], Any]]:
    """Build `collator` with a tokenizer that pads on the right, as encoders need."""

    def build() -> Callable[[list], Any]:
        tokenizer = hf.PreTrainedTokenizerFast(
            tokenizer_object=word_tokenizer().backend_tokenizer, pad_token="[PAD]", padding_side="right"
        )
        return collator(tokenizer, **options)

    return build


TEXTS = right_padded(hf.DataCollatorWithPadding)
LABELLED_TOKENS = right_padded(hf.DataCollatorForTokenClassification)
WRITTEN = right_padded(hf.DataCollatorForSeq2Seq)
CHOICES = right_padded(hf.DataCollatorForMultipleChoice)


def STACKED() -> Callable[[list], Any]:
    return stack_fields


def case(architecture: str, sizes: dict[str, Any], row: Callable, collator: Callable, loss: str) -> HeadCase:
    return HeadCase(architecture=architecture, sizes=sizes, row=row, collator=collator, loss=loss)


CLASSES = "SequenceClassificationLoss"
WRITING = "Seq2SeqLoss"
CASES = {
    "classes": case("BertForSequenceClassification", BERT, lambda i: text(i, labels=i % 3), TEXTS, CLASSES),
    "several labels": case(
        "BertForSequenceClassification", BERT, lambda i: text(i, labels=[float(i % 2), 1.0, 0.0]), TEXTS, CLASSES
    ),
    "a number": case(
        "BertForSequenceClassification", BERT | {"num_labels": 1}, lambda i: text(i, labels=i / 7), TEXTS, CLASSES
    ),
    "several numbers": case(
        "BertForSequenceClassification",
        BERT | {"problem_type": "regression"},
        lambda i: text(i, labels=[i / 7, 0.0, 1.0]),
        TEXTS,
        CLASSES,
    ),
    "tokens": case(
        "BertForTokenClassification",
        BERT,
        lambda i: text(i, labels=token_classes(i)),
        LABELLED_TOKENS,
        "TokenClassificationLoss",
    ),
    "answers": case(
        "BertForQuestionAnswering",
        BERT | {"num_labels": 2},
        lambda i: text(i, start_positions=1, end_positions=2 + i % 2),
        TEXTS,
        "QuestionAnsweringLoss",
    ),
    "choices": case("BertForMultipleChoice", BERT, choices, CHOICES, "MultipleChoiceLoss"),
    "masked words": case("BertForMaskedLM", BERT, lambda i: text(i, labels=masked(i)), LABELLED_TOKENS, "MaskedLMLoss"),
    "next words": case(
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
        lambda i: text(i, labels=tokens(i)),
        LABELLED_TOKENS,
        "CausalLMLoss",
    ),
    "t5": case("T5ForConditionalGeneration", T5, lambda i: text(i, labels=tokens(i + 1)[-3:]), WRITTEN, WRITING),
    "bart": case(
        "BartForConditionalGeneration", BART, lambda i: text(i, labels=tokens(i + 1)[i % 2 :]), WRITTEN, WRITING
    ),
    "classes by t5": case("T5ForSequenceClassification", T5, lambda i: text(i, labels=i % 3), TEXTS, CLASSES),
    "classes by bart": case("BartForSequenceClassification", BART, lambda i: text(i, labels=i % 3), TEXTS, CLASSES),
    "images": case("ViTForImageClassification", VIT, lambda i: image(i, labels=i % 3), STACKED, CLASSES),
    "images by convolutions": case(
        "ResNetForImageClassification", RESNET, lambda i: image(i, labels=i % 3), STACKED, CLASSES
    ),
    "segments": case(
        "SegformerForSemanticSegmentation",
        SEGFORMER,
        lambda i: image(i, labels=map_of_classes(i)),
        STACKED,
        "OwnLoss",
    ),
    "sounds": case(
        "Wav2Vec2ForSequenceClassification",
        WAV2VEC2,
        lambda i: {"input_values": numbers(i, 400), "labels": i % 3},
        STACKED,
        CLASSES,
    ),
    "letters of sounds": case(
        "Wav2Vec2ForCTC",
        WAV2VEC2,
        lambda i: {"input_values": numbers(i, 400), "labels": [3, 4 + i % 3, 5]},
        STACKED,
        "OwnLoss",
    ),
    "words of sounds": case(
        "WhisperForConditionalGeneration",
        WHISPER,
        lambda i: {"input_features": numbers(i, 8, 32), "labels": [5 + i % 5, 6, 3]},
        STACKED,
        WRITING,
    ),
    "next sentences": case("BertForNextSentencePrediction", BERT, lambda i: text(i, labels=i % 2), TEXTS, "OwnLoss"),
}
