"""A head on the features of a base model, as a log describes it and as a replay builds it again."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from hf_dpzo.models.feature_classifier import FeatureClassifier
from hf_dpzo.models.unwrap import class_name
from hf_dpzo.trajectory.base_config import ALWAYS_NUMBERS, count_numbers
from hf_dpzo.trajectory.header import TrajectoryError


def describe_feature_base(model: FeatureClassifier) -> dict[str, Any]:
    """Describe the base model of `model`, how it is loaded, and which of its states are read."""
    config = model.config
    loading = {"dtype": config.base_dtype, "quantization": config.base_quantization}
    read = {"layer": config.layer, "position": config.position}
    if config.beginning is not None:
        read["beginning"] = config.beginning
    return {
        "architecture": class_name(model.base),
        "name": config.base,
        "revision": config.base_revision,
        "features": read,
        **{name: value for name, value in loading.items() if value is not None},
    }


def build_on_features(body: PreTrainedModel, description: Mapping[str, Any]) -> FeatureClassifier:
    """Return the head that a log describes, on `body`; what it holds is restored from the initial values.

    Args:
        body: the base model, as it is loaded.
        description: the header's `base`. A stranger may have written it.

    Raises:
        TrajectoryError: the head would be larger than the base model.
    """
    head = description["head"]
    names = {int(number): label for number, label in (head.get("id2label") or {}).items()}
    if len(names) * body.config.get_text_config().hidden_size > count_numbers(body) + ALWAYS_NUMBERS:
        raise TrajectoryError(f"base.head.id2label: {len(names)} classes make a head larger than the model below it.")
    body.config.name_or_path, body.config._commit_hash = description["name"], description["revision"]
    read = dict(description["features"])
    beginning = read.pop("beginning", None)
    model = FeatureClassifier.on_base(body, id2label=names, problem_type=head.get("problem_type"), **read)
    model.config.beginning = beginning
    model.config.label2id, model.config.pad_token_id = head.get("label2id"), head.get("pad_token_id")
    return model
