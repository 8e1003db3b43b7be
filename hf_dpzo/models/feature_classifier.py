"""A classification head on the hidden states of a frozen model: the head is all that is trained, and all that is saved.

The states of a row do not move in training, so they are computed once, and a step is a product of matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import cached_file

from hf_dpzo.models.beginning import MIN_TOKENS, Beginning, find_common_beginning
from hf_dpzo.models.feature_config import FeatureClassifierConfig, describe_base, load_base
from hf_dpzo.models.feature_rule import Standard, measure_standard, pool
from hf_dpzo.models.float32_residual import keep_residual_in_float32
from hf_dpzo.models.layer_reader import LayerReader, choose_layer, choose_position, find_body, find_layers
from hf_dpzo.models.precision import describe_reduced_precision, forget_unpacked_quantizer
from hf_dpzo.models.public_texts import PUBLIC_TEXTS
from hf_dpzo.models.set_aside import SetAside


POSITIONS = ("last", "mean")


# The weight of the constant beside a row's features, which have norm 1. With a larger one, most of what a probe point
# moves would be the bias.
BIAS_WEIGHT = 0.3


# How far reading on after a beginning may move a state, relative to its distance from the mean: more than by rounding,
# of a float32 base and of one in few bits.
BEGINNING_TOLERANCE, REDUCED_TOLERANCE = 1e-3, 0.2


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
        self._beginning: Beginning | None = None
        self.post_init()

    @property
    def base(self) -> PreTrainedModel:
        """The frozen model."""
        return self._frozen.model

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FeatureClassifier":
        """Move the base too, wherever this model is moved, or whatever type it is given."""
        self.base._apply(fn, recurse)
        self._beginning = None
        return super()._apply(fn, recurse)

    @classmethod
    def on_base(
        cls,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        id2label: Mapping[int, str],
        layer: int | None = None,
        position: str | None = None,
        problem_type: str | None = None,
        texts: Sequence[str | list[int]] = PUBLIC_TEXTS,
    ) -> "FeatureClassifier":
        """Return a classifier on `base`, whose head is new.

        Args:
            base: the model to read, with or without a head of its own. It is frozen.
            tokenizer: turns `texts` into tokens; `None` for features that are neither centred nor scaled.
            id2label: the names of the classes.
            layer: the number of layers to compute; by default three quarters of them.
            position: "last" for the last token of a row, "mean" for the mean over its own tokens; by default the last
                one, which is what has read the whole row, of a causal language model, and the mean of any other.
            problem_type: as in transformers; by default a class, or a number if there is a single output.
            texts: PUBLIC texts, or their tokens, in the form of the rows: by them features are centred and scaled.

        Raises:
            ValueError: there is no such layer or position.
        """
        forget_unpacked_quantizer(base)
        body = find_body(base)
        keep_residual_in_float32(body)
        config = describe_base(body)
        count = len(find_layers(body))
        config.layer = choose_layer(count) if layer is None else layer
        config.position = position or choose_position(body)
        config.problem_type = problem_type
        config.id2label, config.label2id = dict(id2label), {name: number for number, name in id2label.items()}
        _refuse_unreadable(config, count)
        model = cls(config, body).to(next(body.parameters()).device).eval()
        model.config.name_or_path = config.base
        model.config._commit_hash = config.base_revision
        if tokenizer is not None:
            rows = [tokenizer(text)["input_ids"] if isinstance(text, str) else text for text in texts]
            model._adopt(measure_standard(model.read_alone, rows))
            model._begin_together(rows)
        return model

    @torch.no_grad()
    def _begin_together(self, rows: Sequence[Sequence[int]]) -> None:
        """Let the base compute what all public `rows` begin with once, unless that changes more than rounding."""
        tokens = find_common_beginning(rows)
        if len(tokens) < MIN_TOKENS or self.config.position != "last" or not LayerReader.can_continue(self.base):
            return
        whole = self.read_alone(rows[0])
        self.config.beginning = tokens
        changed = (self.read_alone(rows[0]) - whole).norm()
        tolerance = BEGINNING_TOLERANCE if describe_reduced_precision(self.base) is None else REDUCED_TOLERANCE
        if not changed <= tolerance * (whole - self.center).norm():
            self.config.beginning = None

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
            if self.config.beginning and not given:
                return self._read_by_beginning(reader, input_ids, mask)
            states = reader({"input_ids": input_ids, "attention_mask": mask, **given})
            return pool(states.float(), mask, self.config.position)

    def _read_by_beginning(self, reader: LayerReader, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the states of rows, read on after the beginning; those of a row that begins otherwise, read whole.

        So how a row is read depends on that row alone, whatever rows are beside it.
        """
        if self._beginning is None:
            self._beginning = Beginning.compute(reader, self.config.beginning, self.center.device)
        begun = self._beginning.find_rows(input_ids, mask)
        read = torch.empty(len(input_ids), self.config.hidden_size, device=input_ids.device)
        if begun.any():
            states = self._beginning.read(reader, input_ids, mask)
            read = pool(states.float(), mask[:, len(self._beginning.tokens) :], self.config.position)
        if not begun.all():
            states = reader({"input_ids": input_ids, "attention_mask": mask})
            read = torch.where(begun[:, None], read, pool(states.float(), mask, self.config.position))
        return read

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


def _refuse_unreadable(config: FeatureClassifierConfig, count: int) -> None:
    if not 1 <= config.layer <= count:
        raise ValueError(f"layer={config.layer}: the base has {count} layers; choose one of them, from 1.")
    if config.position not in POSITIONS:
        raise ValueError(f"position={config.position!r}: choose one of {', '.join(POSITIONS)}.")


AutoModelForSequenceClassification.register(FeatureClassifierConfig, FeatureClassifier)
