"""The reward of generated text, by functions that were written for reinforcement learning."""

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_dpzo.losses.generation import Generation
from hf_dpzo.losses.objective import TextObjective


RewardFunction = Callable[..., Sequence[float | None]]


class GenerationReward(TextObjective):
    """Trains on rewards of generated text. The loss of a row is its negative reward.

    Each prompt is continued greedily. Reward functions are those of TRL's GRPOTrainer, with its arguments: `prompts`,
    `completions`, `completion_ids`, every other column of the data set by its name, `trainer_state`, and `log_extra`
    and `log_metric`, which keep nothing here. They are called with one row at a time, so that no reward depends on a
    neighbour. Rows have a column `prompt`, a text or a list of messages, or `input_ids`.

    Args:
        reward_funcs: one or several of: a function `(prompts, completions, **columns) -> list of numbers`, which may be
            asynchronous, and returns `None` for a row that it has no reward for; a model with a classification head of
            one output; and the name or the folder of such a model.
        max_new_tokens: the number of tokens that every row decodes. What follows the end token is cut off.
        processing_class: the model's tokenizer; by default the trainer's.
        reward_weights: the weight of each function; by default 1.
        reward_processing_classes: the tokenizer of each reward model; `None` for a function, and for the tokenizer that
            belongs to the model.
        max_prompt_length: the largest number of tokens of a prompt, of which the last ones are kept.
        stop_strings: texts before which a completion ends.

    Guarantee: a row for which a function fails, and one that none of them has a reward for, counts as zero.

    Raises:
        ValueError: an argument has a wrong value; the message names it.

    Source: reward functions as in Shao et al. 2024 (GRPO) and TRL 1.16.

    >>> def is_short(completions, **columns):
    ...     return [float(len(completion) < 20) for completion in completions]
    >>> GenerationReward(is_short, max_new_tokens=8).score({}, "Say yes.", "Yes.", [5, 6])
    1.0
    """

    def __init__(
        self,
        reward_funcs: Any,
        max_new_tokens: int,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        reward_weights: Sequence[float] | None = None,
        reward_processing_classes: Sequence[PreTrainedTokenizerBase | None] | None = None,
        max_prompt_length: int | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        super().__init__(
            Generation(
                tokenizer=processing_class,
                max_new_tokens=max_new_tokens,
                max_prompt_length=max_prompt_length,
                stop_strings=tuple(stop_strings),
            )
        )
        functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        weights = [1.0] * len(functions) if reward_weights is None else [float(weight) for weight in reward_weights]
        tokenizers = [None] * len(functions) if reward_processing_classes is None else list(reward_processing_classes)
        if not functions or len(weights) != len(functions) or len(tokenizers) != len(functions):
            raise ValueError(
                f"reward_funcs={len(functions)}: there are {len(weights)} weights and {len(tokenizers)} tokenizers; "
                "pass one function at least, and as many of each."
            )
        pairs = zip(functions, tokenizers, strict=True)
        self._functions = [_as_function(function, tokenizer) for function, tokenizer in pairs]
        self._weights = weights

    def score(self, columns: Mapping[str, Any], prompt: Any, completion: Any, tokens: Sequence[int]) -> float:
        """Return the weighted sum of the rewards that there are, or NaN if there is none."""
        passed = {name: [value] for name, value in columns.items() if name not in ("prompt", "completion")}
        passed |= {"trainer_state": self.progress(), "log_extra": _keep_nothing, "log_metric": _keep_nothing}
        passed |= {"prompts": [prompt], "completions": [completion], "completion_ids": [list(tokens)]}
        rewards = [_call(function, passed) for function in self._functions]
        known = [weight * r for weight, r in zip(self._weights, rewards, strict=True) if not math.isnan(r)]
        return sum(known) if known else math.nan


class _ModelReward:
    """Scores a prompt and its completion by a model with one output.

    Args:
        model: the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        rewards = []
        for prompt, completion in zip(prompts, completions, strict=True):
            joined = prompt + completion
            text = joined if isinstance(joined, str) else self._tokenizer.apply_chat_template(joined, tokenize=False)
            inputs = self._tokenizer(text, return_tensors="pt", add_special_tokens=False).to(self._model.device)
            rewards.append(self._model(**inputs).logits[0, 0].item())
        return rewards


def _as_function(function: Any, tokenizer: PreTrainedTokenizerBase | None) -> RewardFunction:
    if isinstance(function, str):
        function = AutoModelForSequenceClassification.from_pretrained(function, num_labels=1)
    if isinstance(function, PreTrainedModel):
        return _ModelReward(function, tokenizer or AutoTokenizer.from_pretrained(function.config.name_or_path))
    if not callable(function):
        raise ValueError(
            f"reward_funcs={type(function).__name__}: it is neither a function nor a model with a classification head; "
            "pass (prompts, completions, **columns) -> list of numbers."
        )
    return function


def _call(function: RewardFunction, passed: Mapping[str, Any]) -> float:
    """Return the reward of one row; NaN for `None`."""
    rewards = function(**passed)
    if inspect.isawaitable(rewards):
        rewards = _wait_for(rewards)
    name = getattr(function, "__name__", type(function).__name__)
    try:
        rewards = [*rewards]
    except TypeError:
        raise ValueError(
            f"reward_funcs={name}: it returned {type(rewards).__name__}; return a list, with one number each."
        ) from None
    if len(rewards) != 1:
        raise ValueError(f"reward_funcs={name}: it returned {len(rewards)} rewards for 1 completion; return one each.")
    if isinstance(rewards[0], str):
        raise ValueError(f"reward_funcs={name}: a reward is a text; return a number, or None for no reward.")
    return math.nan if rewards[0] is None else float(rewards[0])


def _wait_for(coroutine: Coroutine[Any, Any, Sequence[float | None]]) -> Sequence[float | None]:
    """Return what `coroutine` returns, also where a notebook runs an event loop of its own in this thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(functools.partial(asyncio.run, coroutine)).result()


def _keep_nothing(*_: object, **__: object) -> None:
    """Stand in for TRL's loggers, because what is logged would be a function of private rows."""
