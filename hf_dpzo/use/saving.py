"""Folders that plain transformers and PEFT open, and the check that they give back what was saved."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_dpzo.losses.per_example import find_scores
from hf_dpzo.models.public_texts import PUBLIC_TEXTS
from hf_dpzo.models.unwrap import class_name, unwrap_model


# The largest change of a score that is taken for rounding, relative to the largest score.
TOLERANCE = 1e-4


# The number of public texts that two models are compared on, and of tokens of each.
_TEXTS, _TOKENS = 8, 24


def require_new_folder(output: str | Path) -> Path:
    """Return the folder `output`, which is made; raise `ValueError` if it holds anything."""
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={output}: it is there already, and is not emptied; name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model of transformers, and its tokenizer, into `folder`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def compute_scores(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Return the scores of public texts, of each text alone."""
    return [score for text in PUBLIC_TEXTS[:_TEXTS] for score in _score(model.eval(), tokenizer, text)]


def _score(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[torch.Tensor]:
    base = unwrap_model(model)
    tokens = torch.tensor([tokenizer(text)["input_ids"][:_TOKENS]])
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if class_name(base).endswith("ForMultipleChoice"):
        inputs = {name: torch.stack([value, value], dim=1) for name, value in inputs.items()}
    if getattr(base.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens[:, :4]
    scores = find_scores(model(**inputs))
    yield from (one.float() for one in (scores if isinstance(scores, tuple) else (scores,)))


def measure_drift(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """Return how far scores differ at most, relative to the largest one."""
    largest = max(float(one.abs().max()) for one in before)
    drift = max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True))
    return drift / max(largest, 1e-30)


def require_same_scores(
    before: list[torch.Tensor], after: list[torch.Tensor], explain: Callable[[float], str]
) -> float:
    """Return how far two models differ, relative to the largest score; raise `ValueError` beyond `TOLERANCE`."""
    drift = measure_drift(before, after)
    if not drift <= TOLERANCE:
        raise ValueError(explain(drift))
    return drift
