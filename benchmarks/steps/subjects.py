"""What is measured on: a model, what of it is trained, one fixed batch, and the loss of each of its rows."""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GgufConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    default_data_collator,
)

from hf_dpzo.losses import CausalLMLoss, PerExampleLoss, SequenceClassificationLoss
from hf_dpzo.losses.prompting import NextWordLoss
from hf_dpzo.models.location import resolve_path
from hf_dpzo.models.seeded import seeded_peft_model


# So small that no step changes what the next one costs.
RATE, SMOOTHING = 1e-6, 1e-3
# Any two tokens: what a step costs does not depend on what the words are.
WORDS = (5, 6)
LOSSES: dict[str, Callable[[torch.nn.Module], PerExampleLoss]] = {
    "prompt": lambda model: NextWordLoss(words=WORDS, model=model),
    "next-token": CausalLMLoss,
    "head": SequenceClassificationLoss,
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its batch.

    Args:
        model: in float32, with gradients required of what is trained.
        rows: the batch; all are equally long.
        inputs: the same, collated.
        loss: one number for each row.
    """

    model: torch.nn.Module
    rows: Dataset
    inputs: Mapping[str, torch.Tensor]
    loss: PerExampleLoss

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def build(spec: Mapping[str, Any], *, trained: str | int, rows: int, tokens: int, loss: str) -> Subject:
    """Return the subject that a model's entry of the plan describes.

    Args:
        spec: the entry, with the `folder` that `convert` left the model in, where it has one.
        trained: `all`, `lora` (rank 8, on queries and values), or how many of the last layers.
        rows: of the batch.
        tokens: in each row.
        loss: a name in `LOSSES`.
    """
    model = _model(spec)
    if trained == "lora":
        kind = TaskType.CAUSAL_LM if spec["loss"] != "head" else TaskType.SEQ_CLS
        model = seeded_peft_model(model, LoraConfig(task_type=kind, r=8, target_modules=spec["lora"]), seed=0)
    elif trained != "all":
        model.requires_grad_(False)
        for layer in model.model.decoder.layers[-trained:]:
            layer.requires_grad_(True)
    batch = _rows(rows, tokens, vocabulary=model.config.vocab_size, next_token=loss == "next-token")
    inputs = default_data_collator(batch.to_list())
    return Subject(model=model.eval(), rows=batch, inputs=inputs, loss=LOSSES[loss](model))


def convert(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return `spec` with the `folder` that its model is in, which is quick to load from."""
    if "gguf_file" not in spec:
        return dict(spec)
    source = {"gguf_file": spec["gguf_file"], "quantization_config": GgufConfig(dequantize=True)}
    with contextlib.redirect_stderr(io.StringIO()):  # Progress bars.
        model = AutoModelForCausalLM.from_pretrained(resolve_path(spec["path"]), dtype=torch.float32, **source)
    model.save_pretrained(folder)
    return {**spec, "path": str(folder)}


def _model(spec: Mapping[str, Any]) -> PreTrainedModel:
    if "path" not in spec:
        torch.manual_seed(0)
        return OPTForCausalLM(OPTConfig(**spec["config"]))
    kind = AutoModelForCausalLM if spec["loss"] != "head" else AutoModelForSequenceClassification
    model = kind.from_pretrained(resolve_path(spec["path"]), dtype=torch.float32, **spec["config"])
    for parameter in model.parameters():  # The file may stay mapped, and its pages are not the model's alone.
        parameter.data = parameter.data.clone()
    return model


def _rows(count: int, tokens: int, *, vocabulary: int, next_token: bool) -> Dataset:
    ids = torch.randint(10, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    mask = [1] * tokens
    labels = ids if next_token else [i % 2 for i in range(count)]
    rows = [{"input_ids": ids[i], "attention_mask": mask, "labels": labels[i]} for i in range(count)]
    return Dataset.from_list(rows)
