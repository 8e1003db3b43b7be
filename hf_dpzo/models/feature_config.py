"""Which layer of which frozen model a head on features reads, and how that model is loaded."""

from typing import Literal

import torch
from transformers import AutoConfig, AutoModel, GgufConfig, PreTrainedConfig, PreTrainedModel

from hf_dpzo.models.float32_residual import keep_residual_in_float32
from hf_dpzo.models.location import find_cached_commit, resolve_path
from hf_dpzo.models.precision import build_loading_options, describe_loading, forget_unpacked_quantizer
from hf_dpzo.models.unwrap import unwrap_model


class FeatureClassifierConfig(PreTrainedConfig):
    """Says which layer of which frozen model a `FeatureClassifier` reads, and how.

    Args:
        base: the frozen model: a name on the Hub, a folder, package://name, or a GGUF file in one of these.
        base_revision: its commit on the Hub.
        base_dtype: the type that its weights are loaded as; `None` for float32.
        base_quantization: its quantization after loading; `None` for none.
        layer: the number of layers that are computed, from 1.
        position: where in a row its states are read: at its last token, or as the mean over its own tokens.
        hidden_size: the number of features of a row.
        vocab_size: the number of tokens that the base knows.
        beginning: the tokens that rows begin with, of which the base computes what it needs once; `None` for none.
    """

    model_type = "feature_classifier"

    base: str = ""
    base_revision: str | None = None
    base_dtype: str | None = None
    base_quantization: str | None = None
    layer: int = 1
    position: Literal["last", "mean"] = "last"
    hidden_size: int = 1
    vocab_size: int = 1
    beginning: list[int] | None = None
    pad_token_id: int | None = None


def load_base(config: FeatureClassifierConfig) -> PreTrainedModel:
    """Load the frozen model that `config` names, without its head."""
    location, options = config.base, build_loading_options(config.base_dtype, config.base_quantization)
    if location.endswith(".gguf"):
        location, _, options["gguf_file"] = location.rpartition("/")
        options["quantization_config"] = GgufConfig(dequantize=True)
    if config.base_revision is not None:
        options["revision"] = config.base_revision
    base = AutoModel.from_pretrained(resolve_path(location), **options)
    forget_unpacked_quantizer(base)
    keep_residual_in_float32(base)
    return base


def describe_base(body: PreTrainedModel) -> FeatureClassifierConfig:
    """Return a configuration that says which model `body` is, and how it is loaded."""
    text, loading = body.config.get_text_config(), describe_loading(body)
    name = body.config.name_or_path
    return FeatureClassifierConfig(
        base=name,
        base_revision=getattr(body.config, "_commit_hash", None) or find_cached_commit(name),
        base_dtype=loading.get("dtype"),
        base_quantization=loading.get("quantization"),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        pad_token_id=text.pad_token_id,
    )


def find_beginning(model: torch.nn.Module) -> tuple[int, ...]:
    """Return the tokens that rows of a head on features begin with; none for any other model, or without any.

    >>> find_beginning(torch.nn.Linear(2, 2))
    ()
    """
    config = getattr(unwrap_model(model), "config", None)
    return tuple(config.beginning or ()) if isinstance(config, FeatureClassifierConfig) else ()


AutoConfig.register(FeatureClassifierConfig.model_type, FeatureClassifierConfig)
