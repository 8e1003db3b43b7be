"""Merges an adapter into its base model, and refuses where the merged model would be another one."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from hf_dpzo.card.opening import open_whole
from hf_dpzo.models.precision import describe_reduced_precision, forget_unpacked_quantizer
from hf_dpzo.models.unwrap import is_prompt_tuned
from hf_dpzo.use.describing import PLACE, describe_folder
from hf_dpzo.use.model import TrainedModel
from hf_dpzo.use.saving import (
    TOLERANCE,
    compute_scores,
    require_new_folder,
    require_same_scores,
    save_model,
)


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What became of a merged model.

    Args:
        folder: where it was saved.
        drift: how far its scores of public texts differ from the adapter's, relative to the largest score.
    """

    folder: Path
    drift: float


def merge_adapter(trained: TrainedModel, output: str | Path) -> Merged:
    """Merge the adapter of `trained` into its base model, and save the result with its tokenizer.

    Guarantee: what a loader of transformers finds in `output` scores public texts as the adapter does, up to
    `TOLERANCE` of the largest score. Otherwise nothing is left there. Merging is post-processing: it costs no privacy.

    Args:
        trained: the model. Its adapter is gone afterwards.
        output: a new folder.

    Raises:
        ValueError: there is no adapter, or it can not be merged, or the merged model would be another one.
    """
    model = trained.model
    _refuse_unmergeable(model)
    folder = require_new_folder(output)
    try:
        model.float()  # What 16 bits hold is kept, and a sum is not rounded to them.
        before = compute_scores(model, trained.tokenizer)
        merged = model.merge_and_unload(safe_merge=True)
        forget_unpacked_quantizer(merged)
        after = compute_scores(merged, trained.tokenizer)
        drift = require_same_scores(before, after, _explain_merging)
        save_model(merged, trained.tokenizer, folder)
        loaded = type(merged).from_pretrained(folder)
        drift = max(drift, require_same_scores(before, compute_scores(loaded, trained.tokenizer), _explain_loading))
    except BaseException:
        shutil.rmtree(folder)
        raise
    describe_folder(
        trained, folder, how="merged into its base model", library="transformers", opening=open_whole(PLACE)
    )
    return Merged(folder=folder, drift=drift)


def _refuse_unmergeable(model: torch.nn.Module) -> None:
    if not isinstance(model, PeftModel):
        kind = "its own parameters were trained" if isinstance(model, PreTrainedModel) else "it is a head"
        raise ValueError(f"model: it has no adapter ({kind}), so there is nothing to merge; use hf-dpzo export.")
    if getattr(model.active_peft_config, "alora_invocation_tokens", None):
        raise ValueError(
            "model: its adapter is activated by a text in the prompt, and merged weights would always compute; use it "
            "by PEFT, with what hf-dpzo export writes."
        )
    if is_prompt_tuned(model):
        raise ValueError(
            "model: its adapter is virtual tokens, which no weights can hold; use it by PEFT, with what hf-dpzo export "
            "writes."
        )
    reduced = describe_reduced_precision(model)
    if reduced is not None and "quantized" in reduced:
        raise ValueError(
            f"model: {reduced}, and merging would round the adapter away; use it by PEFT, with what hf-dpzo export "
            "writes."
        )


def _explain_merging(drift: float) -> str:
    return (
        f"model: merged, its scores of public texts would differ by {drift:.2g} of the largest, and {TOLERANCE:g} is "
        "allowed; the adapter is on a weight that the model uses twice, such as tied embeddings: use it by PEFT, with "
        "what hf-dpzo export writes."
    )


def _explain_loading(drift: float) -> str:
    return (
        f"model: merged, saved and loaded again, its scores of public texts differ by {drift:.2g} of the largest, and "
        f"{TOLERANCE:g} is allowed; a loader ties weights that merging has made different: use it by PEFT, with what "
        "hf-dpzo export writes."
    )
