"""Writes a trained model with all that it needs, its base model too, for transformers, PEFT and llama.cpp."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from hf_dpzo.card.opening import open_adapter, open_whole
from hf_dpzo.models.feature_classifier import FeatureClassifier
from hf_dpzo.models.float32_residual import keep_residual_in_float32
from hf_dpzo.models.precision import forget_unpacked_quantizer
from hf_dpzo.use.describing import PLACE, describe_folder
from hf_dpzo.use.merging import merge_adapter
from hf_dpzo.use.model import TrainedModel
from hf_dpzo.use.saving import compute_scores, require_new_folder, require_same_scores, save_model


# The folder of the base model within an exported one.
BASE_FOLDER = "base"


# What a folder says that has its base model in it.
_MOVED = (
    f"The base model is in the folder `{BASE_FOLDER}`, which `{{file}}` names by its full path: when you move or "
    "publish this folder, write the new place there, as `{field}`."
)
_HEAD = (
    "It is a head on features: `import hf_dpzo`, and then `AutoModelForSequenceClassification` and "
    '`pipeline("text-classification")` open it. They read a text as it is, so write it into the template of the recipe.'
)


# The program by which llama.cpp converts folders of transformers.
GGUF_CONVERTER = "convert_hf_to_gguf.py"


def export_model(trained: TrainedModel, output: str | Path) -> Path:
    """Write `trained` into the new folder `output`, as safetensors that need nothing else of this machine.

    An adapter, or a head on features, has its base model beside it, in the folder `base` of it, unpacked if it was a
    GGUF file. So PEFT's auto classes and pipelines of transformers open `output`; for a head on features, after
    `import hf_dpzo`. Move the whole folder, and write the new place of `base` into its configuration.

    Raises:
        ValueError: the folder holds something, or what was written does not load as it was.
    """
    folder = require_new_folder(output)
    model, tokenizer = trained.model, trained.tokenizer
    try:
        before = compute_scores(model, tokenizer)
        if isinstance(model, PeftModel):
            loaded, library, opening = _export_adapter(model, trained, folder), "peft", open_adapter(PLACE)
            note = _MOVED.format(file="adapter_config.json", field="base_model_name_or_path")
        elif isinstance(model, FeatureClassifier):
            loaded, library, opening = _export_head(model, trained, folder), "transformers", None
            note = f"{_HEAD} {_MOVED.format(file='config.json', field='base')}"
        else:
            save_model(model, tokenizer, folder)
            loaded, library, opening = type(model).from_pretrained(folder), "transformers", open_whole(PLACE)
            note = ""
        keep_residual_in_float32(loaded)  # As the trained model computes, if its base is in 16 bits.
        require_same_scores(before, compute_scores(loaded, tokenizer), _explain)
    except BaseException:
        shutil.rmtree(folder)
        raise
    how = "exported with its base model" if note else "exported"
    describe_folder(trained, folder, how=how, library=library, opening=opening, note=note)
    return folder


def _export_adapter(model: PeftModel, trained: TrainedModel, folder: Path) -> torch.nn.Module:
    base_folder = (folder / BASE_FOLDER).resolve()
    config = model.active_peft_config
    config.base_model_name_or_path, config.revision = str(base_folder), None
    model.get_base_model().config.save_pretrained(base_folder)  # PEFT compares the size of the vocabulary with it.
    model.save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)
    base = model.unload()
    forget_unpacked_quantizer(base)
    save_model(base, trained.tokenizer, base_folder)
    kind = type(base)
    return PeftModel.from_pretrained(kind.from_pretrained(base_folder, dtype=base.dtype), folder)


def _export_head(model: FeatureClassifier, trained: TrainedModel, folder: Path) -> torch.nn.Module:
    base_folder = (folder / BASE_FOLDER).resolve()
    forget_unpacked_quantizer(model.base)
    save_model(model.base, trained.tokenizer, base_folder)
    model.config.base, model.config.base_revision = str(base_folder), None
    save_model(model, trained.tokenizer, folder)
    return AutoModelForSequenceClassification.from_pretrained(str(folder))


def find_gguf_converter() -> str:
    """Return the path of llama.cpp's converter; raise `ValueError` if it is not installed."""
    found = shutil.which(GGUF_CONVERTER)
    if found is None:
        raise ValueError(
            f"gguf: llama.cpp's {GGUF_CONVERTER} is not on the PATH; install llama.cpp and put its folder there, or "
            "leave this out and convert the folder by it later."
        )
    return found


def export_gguf(trained: TrainedModel, file: str | Path) -> None:
    """Write `trained` as one GGUF file, by llama.cpp's own converter; an adapter is merged first.

    Raises:
        ValueError: the converter is not installed or fails, the adapter can not be merged, or the model is a head on
            features, which llama.cpp does not know.
    """
    converter = find_gguf_converter()
    if isinstance(trained.model, FeatureClassifier):
        raise ValueError("gguf: llama.cpp knows no head on features; export the model without it.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if isinstance(trained.model, PeftModel):
            merge_adapter(trained, folder)
        else:
            save_model(trained.model, trained.tokenizer, folder)
        command = [sys.executable, converter, str(folder), "--outfile", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = next(reversed(done.stderr.splitlines()), "it says nothing")
        raise ValueError(f"gguf={file}: {GGUF_CONVERTER} fails ({said[:200]}); it may not know this architecture.")


def _explain(drift: float) -> str:
    return (
        f"model: exported and loaded again, its scores of public texts differ by {drift:.2g} of the largest; report "
        "this, and use the model by hf_dpzo.load."
    )
