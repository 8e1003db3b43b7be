"""The losses of preference data: one loss for each pair of texts.

A collator of TRL stacks the preferred texts of a micro-batch on the others, so a batch of pairs has twice as many
sequences as rows.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from hf_dpzo.losses.per_example import IGNORE_INDEX, ForwardPass, PerExampleLoss, ScoreLoss
from hf_dpzo.losses.target_log_probs import TargetLogProbs, shift_targets
from hf_dpzo.models.unwrap import Inputs


# What a batch of pairs holds besides the arguments of a model.
PAIR_COLUMNS = ("margin", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")


# The log-probabilities of the targets under the reference, `[sequences, tokens - 1]`, from the model that is trained,
# a batch and its targets.
Reference = Callable[[torch.nn.Module, Inputs, torch.Tensor], torch.Tensor]


class RewardLoss(ScoreLoss):
    """The loss of a reward model for one pair: how unlikely it makes the preference (Bradley and Terry 1952).

    It is `-log sigmoid(chosen - rejected - margin)`, and with `center` also `center * (chosen + rejected)^2`, which
    holds the rewards around zero (Eisenstein et al. 2023).

    Args:
        model: a sequence classification model with one output, which is the reward of a text.
        center: the coefficient of the squared sum of the rewards; `None` for none.
    """

    def __init__(self, model: torch.nn.Module, *, center: float | None = None) -> None:
        self._forward = ForwardPass(model)
        self._center = center

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the rewards of the preferred text and of the other one, float32 `[pairs, 2]`."""
        rewards = self._forward(model, drop_pair_columns(inputs)).squeeze(-1)
        return torch.stack(rewards.chunk(2), dim=1)

    def losses(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each pair, float32 `[pairs]`."""
        difference = scores[:, 0] - scores[:, 1]
        if "margin" in inputs:
            difference = difference - inputs["margin"]
        losses = -F.logsigmoid(difference)
        return losses if self._center is None else losses + self._center * scores.sum(dim=1).square()


class PairArithmetic:
    """What a pair's loss is, given the log-probabilities of its tokens."""

    @abstractmethod
    def sum_tokens(self, inputs: Inputs, log_probs: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of both texts of one pair, `[2]`.

        Args:
            inputs: a batch of this pair alone.
            log_probs: the log-probabilities of the targets of both texts, `[2, tokens - 1]`.
        """

    @abstractmethod
    def compute_loss(self, inputs: Inputs, log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return the loss of one pair, a scalar.

        Args:
            inputs: a batch of this pair alone.
            log_probs: the log-probabilities of the targets of both texts, `[2, tokens - 1]`.
            reference: the log-probabilities of both texts under the reference, `[2]`.
        """


class DPOLoss(PerExampleLoss):
    """The loss of direct preference optimization for one pair (Rafailov et al. 2023), in any of its forms.

    The tokens of a micro-batch are evaluated together. The losses follow from them pair by pair, each cut to the pair's
    own length, so that no pair moves the loss of another one.

    Args:
        model: the causal language model that is trained.
        arithmetic: what a pair's loss is, given the log-probabilities of its tokens.
        reference: the log-probabilities under the reference; `None` where the batch holds those of each text.
        beta: the factor of an implicit reward.
    """

    def __init__(
        self, model: torch.nn.Module, *, arithmetic: PairArithmetic, reference: Reference | None, beta: float
    ) -> None:
        self._log_probs = TargetLogProbs(model)
        self._arithmetic = arithmetic
        self._reference = reference
        self._beta = beta

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return one loss for each pair, float32 `[pairs]`."""
        pairs = self._evaluate_pairs(model, inputs)
        return torch.stack([self._arithmetic.compute_loss(*pair) for pair in pairs])

    def scores(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the implicit rewards of the preferred text and of the other one, float32 `[pairs, 2]`."""
        return self.evaluate(model, inputs)[1]

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one loss for each pair, float32 `[pairs]`, and the implicit rewards, `[pairs, 2]`."""
        pairs = self._evaluate_pairs(model, inputs)
        losses = torch.stack([self._arithmetic.compute_loss(*pair) for pair in pairs])
        ratios = [self._arithmetic.sum_tokens(one, log_probs) - reference for one, log_probs, reference in pairs]
        return losses, self._beta * torch.stack(ratios)

    def _evaluate_pairs(
        self, model: torch.nn.Module, inputs: Inputs
    ) -> list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
        """Return for each pair its own inputs, the log-probabilities of its targets, and those under the reference."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
        targets = shift_targets(labels, inputs["attention_mask"])
        arguments = drop_pair_columns(inputs)
        log_probs = self._log_probs(model, arguments, targets)
        reference = None if self._reference is None else self._reference(model, arguments, targets)
        pairs = []
        for index in range(len(labels) // 2):
            one, places, span = cut_out_pair(inputs, index)
            if reference is None:
                of_reference = torch.cat([one["ref_chosen_logps"], one["ref_rejected_logps"]])
            else:
                of_reference = self._arithmetic.sum_tokens(one, reference[places][:, span])
            pairs.append((one, log_probs[places][:, span], of_reference))
        return pairs


def drop_pair_columns(inputs: Inputs) -> dict[str, Any]:
    """Return what a model takes of a batch of pairs."""
    return {name: value for name, value in inputs.items() if name not in PAIR_COLUMNS}


def cut_out_pair(inputs: Inputs, index: int) -> tuple[dict[str, Any], list[int], slice]:
    """Return a batch of one pair alone, the places of its texts among all, and those of its targets among all tokens.

    Args:
        inputs: a batch of pairs, the preferred texts before the others.
        index: the number of the pair.

    >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    >>> one, places, span = cut_out_pair({"input_ids": mask * 7, "attention_mask": mask}, 0)
    >>> one["input_ids"].tolist(), places, span
    ([[7, 7], [7, 0]], [0, 2], slice(0, 1, None))
    """
    mask = inputs["attention_mask"]
    places = [index, index + len(mask) // 2]
    tokens = mask[places].any(dim=0).nonzero().flatten().tolist()
    start, stop = tokens[0], tokens[-1] + 1
    one = {}
    for name, value in inputs.items():
        is_per_sequence = len(value) == len(mask)
        own = value[places] if is_per_sequence else value[[index]]
        one[name] = own[:, start:stop] if is_per_sequence and value.shape[1:2] == mask.shape[1:] else own
    return one, places, slice(start, stop - 1)
