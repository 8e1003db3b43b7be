"""Classification by prompt, as the papers do it: a template, and a word for each label.

A masked language model fills in the word at the mask; a causal one continues the prompt with it. The score of a label
is the logit of its word or, if a label has several tokens, their mean log-probability (Malladi et al. 2023, appendix
E).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_dpzo.losses.calibration import Calibration, spread_texts
from hf_dpzo.losses.output_layer import OutputLayer
from hf_dpzo.losses.per_example import ForwardPass, PerExampleLoss, ScoreLoss, class_losses
from hf_dpzo.losses.template import Template
from hf_dpzo.models.switching import without_adapter
from hf_dpzo.models.unwrap import Inputs, accepts_argument, unwrap_model


@dataclass(frozen=True, kw_only=True)
class Prompt(Template):
    """A template, and one label word for each class, in class order.

    Label words are taken literally. For most causal tokenizers they should begin with a space.

    Args:
        template: the text, with columns in braces. It ends where the label word goes, or has `{mask}` there.
        label_words: a word or a string for each class, in class order.

    Raises:
        ValueError: the text names no column, two classes share a word, or there is more than one `{mask}`.

    >>> Prompt(template="{text} It was {mask}.", label_words=("bad", "good")).has_mask
    True
    """

    label_words: Sequence[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.label_words) < 2 or len(set(self.label_words)) < len(self.label_words):
            raise ValueError(f"label_words={list(self.label_words)}: each class needs a word of its own, two at least.")
        if self.template.count("{mask}") > 1:
            raise ValueError(f"template={self.template!r}: one {{mask}} stands for the label word; remove the others.")

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` of one row. What is to be continued does not end with EOS."""
        encode = super().encode if self.has_mask else super().encode_open
        return encode(row, tokenizer, max_length)

    def loss(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        calibrate_on: Sequence[str | Mapping[str, str]] | None = None,
        max_length: int = 128,
        offsets: Sequence[float] | None = None,
    ) -> PerExampleLoss:
        """Return the loss that scores this prompt with `model`.

        Args:
            model: a masked language model if the template has `{mask}`, and a causal one if not.
            tokenizer: the model's tokenizer; for a causal model it pads on the left.
            calibrate_on: public texts, such as `hf_dpzo.PUBLIC_TEXTS`, or rows of the template's columns. What the
                untouched model gives each label word after them, in the median, is taken off its score (Zhao et al.
                2021). That helps where the model prefers a word whatever the text is, and harms where the texts are of
                one of the classes: compare both. The log and the card of a run state these offsets.
            max_length: the tokens of such a text, at most.
            offsets: in place of `calibrate_on`, the offsets of a run that is used, in class order.

        Raises:
            ValueError: for a template with `{mask}`, the tokenizer has no mask token, or a label word is not one token;
                for one without, the tokenizer pads on the right. Or there are no texts, or offsets of other classes.
        """
        loss = self._build_loss(model, tokenizer)
        if calibrate_on is not None:
            rows = [self.encode(row, tokenizer, max_length) for row in spread_texts(calibrate_on, self.fields)]
            loss.calibrate(model, rows)
        elif offsets is not None:
            if len(offsets) != len(self.label_words):
                raise ValueError(
                    f"offsets={list(offsets)}: there are {len(self.label_words)} label words; name one for each."
                )
            loss.calibration = Calibration.from_offsets(offsets)
        return loss

    def _build_loss(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> "LabelScoreLoss":
        words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in self.label_words]
        are_single_tokens = all(len(tokens) == 1 for tokens in words)
        if self.has_mask:
            if tokenizer.mask_token_id is None:
                raise ValueError(
                    "template has {mask}, but this tokenizer has no mask token: end it where the word goes."
                )
            if not are_single_tokens:
                raise ValueError(
                    f"label_words={list(self.label_words)}: at a mask each must be one token of this model."
                )
            return MaskedWordLoss(
                words=[tokens[0] for tokens in words], mask_token_id=tokenizer.mask_token_id, model=model
            )
        if tokenizer.padding_side != "left":
            raise ValueError(
                "padding_side='right': prompts are continued at their end; set tokenizer.padding_side='left'."
            )
        if are_single_tokens:
            return NextWordLoss(words=[tokens[0] for tokens in words], model=model)
        return LabelStringLoss(strings=words, model=model)


class LabelScoreLoss(ScoreLoss):
    """The cross-entropy of a row's label, from one score for each label, `[batch, labels]`.

    A subclass computes the scores. What `calibration` says is taken off them.
    """

    @abstractmethod
    def score_words(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the model's own scores of the label words, float32 `[batch, labels]`."""

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the scores of the label words, float32 `[batch, labels]`."""
        scores = self.score_words(model, inputs)
        return scores if self.calibration is None else self.calibration.center(scores)

    @torch.no_grad()
    def calibrate(self, model: torch.nn.Module, rows: Sequence[Mapping[str, Any]]) -> None:
        """Set `calibration` to what public `rows` of tokens get from `model`, without the adapter that is trained.

        Raises:
            ValueError: there are no rows, or the model's scores are not finite.
        """
        device = next(model.parameters()).device

        def score(row: Mapping[str, Any]) -> torch.Tensor:
            return self.score_words(model, {name: torch.tensor([value], device=device) for name, value in row.items()})[
                0
            ]

        was_training = model.training
        model.eval()
        try:
            with without_adapter(model):
                self.calibration = Calibration.measure(score, rows)
        finally:
            model.train(was_training)

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each row, float32 `[batch]`."""
        return class_losses(scores, inputs["labels"])


class MaskedWordLoss(LabelScoreLoss):
    """Scores each label by the logit of its word at the mask. `Prompt.loss` builds one.

    No other logits are computed, if the architecture allows it.

    Args:
        words: the token of each label word, in class order.
        mask_token_id: the tokenizer's mask token.
        model: the masked language model.
    """

    def __init__(self, *, words: Sequence[int], mask_token_id: int, model: torch.nn.Module) -> None:
        self._words = list(words)
        self._mask_token_id = mask_token_id
        self._forward = ForwardPass(model)
        self._output_layer = OutputLayer(self._forward)

    def score_words(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the logits of the label words at each row's mask, float32 `[batch, labels]`."""
        tokens = inputs["input_ids"]
        # Counted from the end, because virtual tokens may come in front.
        at = (tokens == self._mask_token_id).int().argmax(dim=1) - tokens.shape[1]
        if self._output_layer.supports(model):
            return self._output_layer.score_words(model, inputs, at, self._words)
        logits = self._forward(model, inputs)
        return logits[torch.arange(len(at), device=at.device), at][:, self._words]


class LastLogits:
    """Calls a causal model on left-padded prompts, and computes only the last logits if the model can.

    Args:
        model: the causal language model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward = ForwardPass(model)
        self._can_select = accepts_argument(unwrap_model(model), "logits_to_keep")

    def __call__(self, model: torch.nn.Module, inputs: Inputs, last: int) -> torch.Tensor:
        """Return the next-token logits at the `last` positions, float32 `[batch, last, vocabulary]`."""
        selection = {"logits_to_keep": last} if self._can_select else {}
        return self._forward(model, {**inputs, **selection})[:, -last:]


class NextWordLoss(LabelScoreLoss):
    """Scores each label by the logit of its word as the token after the prompt. `Prompt.loss` builds one.

    No other logits are computed, if the architecture allows it.

    Args:
        words: the token of each label word, in class order.
        model: the causal language model.
    """

    can_continue = True
    reads_end = True

    def __init__(self, *, words: Sequence[int], model: torch.nn.Module) -> None:
        self._words = list(words)
        self._last_logits = LastLogits(model)
        self._output_layer = OutputLayer(ForwardPass(model))

    def score_words(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the logits of the label words after each prompt, float32 `[batch, labels]`."""
        if self._output_layer.supports(model):
            return self._output_layer.score_words(model, inputs, -1, self._words)
        return self._last_logits(model, inputs, 1)[:, -1, self._words]


class LabelStringLoss(LabelScoreLoss):
    """Scores each label by the mean log-probability of its tokens as a continuation of the prompt.

    `Prompt.loss` builds one if a label has several tokens (Malladi et al. 2023, appendix E).

    Args:
        strings: the tokens of each label, in class order.
        model: the causal language model.
    """

    can_continue = True
    reads_end = True

    def __init__(self, *, strings: Sequence[Sequence[int]], model: torch.nn.Module) -> None:
        self._strings = [list(tokens) for tokens in strings]
        self._last_logits = LastLogits(model)

    def score_words(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the scores, float32 `[batch, labels]`, from one forward pass for each label."""
        return torch.stack([self._score(model, inputs, tokens) for tokens in self._strings], dim=1)

    def _score(self, model: torch.nn.Module, prompt: Inputs, tokens: list[int]) -> torch.Tensor:
        ids = prompt["input_ids"]
        label = torch.tensor(tokens, device=ids.device).expand(len(ids), -1)
        extended = {
            "input_ids": torch.cat([ids, label], dim=1),
            "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(label)], dim=1),
        }
        logits = self._last_logits(model, extended, len(tokens) + 1)[:, :-1]
        return logits.log_softmax(dim=-1).gather(2, label.unsqueeze(2)).squeeze(2).mean(dim=1)
