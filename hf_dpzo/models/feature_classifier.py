"""A classification head on the hidden states of a frozen model: the head is all that is trained, and all that is saved.

The states of a row do not move in training, so they are computed once, and a step is a product of matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import cached_file

from hf_dpzo.models.feature_rule import Standard, measure_standard, pool
from hf_dpzo.models.layer_reader import LayerReader, choose_layer, find_body, find_layers
from hf_dpzo.models.location import find_cached_commit, resolve_path
from hf_dpzo.models.precision import build_loading_options, describe_loading, forget_unpacked_quantizer
from hf_dpzo.models.public_texts import PUBLIC_TEXTS
from hf_dpzo.models.set_aside import SetAside


POSITIONS = ("last", "mean")


# The weight of the constant beside a row's features, which have norm 1. With a larger one, most of what a probe point
# moves would be the bias.
BIAS_WEIGHT = 0.3


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
    pad_token_id: int | None = None


class FeatureClassifier(PreTrainedModel):
    """Classifies texts by a linear head on the features of a frozen base model.

    The features of a row are the states that leave one layer, at one position, centred and scaled by what public texts
    have there, and divided by their norm. They depend on that row alone. Build one by `on_base`.

    Args:
        config: what is read, and what the classes are.
        base: the frozen model, without a head.

    >>> from transformers import LlamaConfig, LlamaModel
    >>> config = LlamaConfig(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=4,
    ...                      num_attention_heads=2, num_key_value_heads=2)
    >>> model = FeatureClassifier.on_base(LlamaModel(config).eval(), id2label={0: "bad", 1: "good"})
    >>> model.config.layer, [name for name, value in model.named_parameters() if value.requires_grad]
    (3, ['classifier.weight', 'classifier.bias'])
    >>> model(features=torch.ones(5, 4)).logits.shape, model(input_ids=torch.tensor([[5, 6]])).logits.shape
    (torch.Size([5, 2]), torch.Size([1, 2]))
    """

    config_class = FeatureClassifierConfig
    base_model_prefix = "base"

    def __init__(self, config: FeatureClassifierConfig, base: PreTrainedModel) -> None:
        super().__init__(config)
        # Out of sight, because it is neither trained nor saved, and steps on features never call it.
        self._frozen = SetAside(base)
        # Frozen parameters, so that a log keeps them with the head's initial values.
        self.center = torch.nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.ones(config.hidden_size), requires_grad=False)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        torch.nn.init.zeros_(self.classifier.weight)
        torch.nn.init.zeros_(self.classifier.bias)
        self.post_init()

    @property
    def base(self) -> PreTrainedModel:
        """The frozen model."""
        return self._frozen.model

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FeatureClassifier":
        """Move the base too, wherever this model is moved, or whatever type it is given."""
        self.base._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @classmethod
    def on_base(
        cls,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        id2label: Mapping[int, str],
        layer: int | None = None,
        position: str = "last",
        problem_type: str | None = None,
        texts: Sequence[str | list[int]] = PUBLIC_TEXTS,
    ) -> "FeatureClassifier":
        """Return a classifier on `base`, whose head is new.

        Args:
            base: the model to read, with or without a head of its own. It is frozen.
            tokenizer: turns `texts` into tokens; `None` for features that are neither centred nor scaled.
            id2label: the names of the classes.
            layer: the number of layers to compute; by default three quarters of them.
            position: "last" for the last token of a row, "mean" for the mean over its own tokens.
            problem_type: as in transformers; by default a class, or a number if there is a single output.
            texts: PUBLIC texts, or their tokens, in the form of the rows: by them features are centred and scaled.

        Raises:
            ValueError: there is no such layer or position.
        """
        forget_unpacked_quantizer(base)
        body = find_body(base)
        config = _describe_base(body)
        count = len(find_layers(body))
        config.layer = choose_layer(count) if layer is None else layer
        config.position, config.problem_type = position, problem_type
        config.id2label, config.label2id = dict(id2label), {name: number for number, name in id2label.items()}
        _refuse_unreadable(config, count)
        model = cls(config, body).to(next(body.parameters()).device).eval()
        model.config.name_or_path = config.base
        model.config._commit_hash = config.base_revision
        if tokenizer is not None:
            model._adopt(measure_standard(model.read_alone, tokenizer, texts))
        return model

    @torch.no_grad()
    def _adopt(self, standard: Standard) -> None:
        """Centre and scale features by `standard`."""
        self.center.copy_(standard.center)
        self.scale.copy_(standard.scale)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *, config: FeatureClassifierConfig | None = None, **options: Any
    ) -> "FeatureClassifier":
        """Load the head from a folder or the Hub, and the base from where the configuration says it is.

        Args:
            pretrained_model_name_or_path: the folder, or the name on the Hub, of the head.
            config: the configuration; by default the one beside the head.
            options: `revision`, `token`, `cache_dir` and so on, for the files of the head.
        """
        source = {name: options[name] for name in _SOURCE_OPTIONS if options.get(name) is not None}
        if config is None:
            config = FeatureClassifierConfig.from_pretrained(pretrained_model_name_or_path, **source)
        model = cls(config, load_base(config))
        path = cached_file(pretrained_model_name_or_path, "model.safetensors", **source)
        model.load_state_dict(load_file(path))
        model.config.name_or_path = str(pretrained_model_name_or_path)
        return model.to(options.get("device_map") or "cpu").eval()

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any) -> torch.Tensor:
        """Return the states of rows at the position that is read, float32 `[batch, hidden_size]`.

        Args:
            input_ids: tokens, `[batch, tokens]`, padded on either side.
            attention_mask: ones at a row's own tokens.
            others: what else the base's forward takes for each token.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {name: value for name, value in others.items() if value is not None}
        # Made for each call, because a model may be copied, moved and wrapped.
        reader = LayerReader(self.base, self.config.layer)
        with torch.no_grad():
            states = reader({"input_ids": input_ids, "attention_mask": mask, **given})
            return pool(states.float(), mask, self.config.position)

    def read_alone(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the states of one row of `tokens` at the position that is read, float32 `[1, hidden_size]`."""
        return self.read(torch.tensor([tokens], device=self.center.device))

    def compute_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Return the features of rows, float32 `[batch, hidden_size]`, of norm 1. For arguments see `read`."""
        states = (self.read(input_ids, attention_mask, **others) - self.center) * self.scale
        return F.normalize(states, dim=-1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Return the scores of the classes, float32 `[batch, classes]`, and with labels their mean loss.

        Args:
            input_ids: tokens, `[batch, tokens]`.
            attention_mask: ones at a row's own tokens, `[batch, tokens]`.
            token_type_ids: the part of a text that each token belongs to, for bases that take it.
            features: features that `compute_features` returned, `[batch, hidden_size]`, in place of tokens.
            labels: the class of each row, or its numbers.
        """
        if features is None:
            features = self.compute_features(input_ids, attention_mask, token_type_ids=token_type_ids)
        logits = F.linear(features, self.classifier.weight, BIAS_WEIGHT * self.classifier.bias)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the embeddings of the base's tokens."""
        return self.base.get_input_embeddings()

    def init_weights(self) -> None:
        """Leave the weights as they are: the base was loaded, and the head begins at zero."""


_SOURCE_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


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
    return base


def _describe_base(body: PreTrainedModel) -> FeatureClassifierConfig:
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


def _refuse_unreadable(config: FeatureClassifierConfig, count: int) -> None:
    if not 1 <= config.layer <= count:
        raise ValueError(f"layer={config.layer}: the base has {count} layers; choose one of them, from 1.")
    if config.position not in POSITIONS:
        raise ValueError(f"position={config.position!r}: choose one of {', '.join(POSITIONS)}.")


AutoConfig.register(FeatureClassifierConfig.model_type, FeatureClassifierConfig)
AutoModelForSequenceClassification.register(FeatureClassifierConfig, FeatureClassifier)
