"""Greedy decoding of a fixed number of tokens, and the prompts that it begins from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hf_dpzo.losses.output_layer import IGNORE_INDEX
from hf_dpzo.models.unwrap import Inputs, unwrap_model


# A token that no model generates, so that nothing ends before all rows have their number of new tokens.
_NEVER = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Greedy decoding, batched, with a cache of keys and values.

    Each row decodes exactly `max_new_tokens` tokens, so that shapes and time depend on no row. What follows a row's end
    token is cut off afterwards.

    Args:
        tokenizer: the model's tokenizer; `None` until it is known.
        max_new_tokens: the number of new tokens.
        max_prompt_length: the largest number of tokens of a prompt, of which the last ones are kept; `None` for all.
        stop_strings: texts before which a completion ends.
        ends_early: whether a batch ends when all of its rows have, so that time depends on rows. Never in training.
        temperature: the temperature to sample at; `None` for the most probable token.

    Raises:
        ValueError: a number of tokens is no positive whole number.
    """

    tokenizer: PreTrainedTokenizerBase | None
    max_new_tokens: int
    max_prompt_length: int | None = None
    stop_strings: tuple[str, ...] = ()
    ends_early: bool = False
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: it is no positive whole number; pass the number of tokens.")

    def encode(self, row: Mapping[str, Any], *, is_encoder_decoder: bool) -> dict[str, Any]:
        """Return `row` with its prompt's `input_ids` and `attention_mask`.

        A row that has `input_ids` keeps them; those of a decoder end before the first token with a label, which is the
        first that the model is to generate. In other rows the column `prompt` is a text, or a list of messages.

        Args:
            row: the row.
            is_encoder_decoder: whether the model reads a prompt by an encoder, so that its decoder begins with nothing.

        Raises:
            KeyError: the row has neither `input_ids` nor `prompt`.
            ValueError: the prompt is empty.
        """
        if "input_ids" not in row and "prompt" not in row:
            raise KeyError(
                "prompt: a row has neither this column nor input_ids; rename the column of its prompts to prompt."
            )
        tokens = list(row["input_ids"]) if "input_ids" in row else self._encode_prompt(row["prompt"])
        if "attention_mask" in row:
            tokens = [token for token, is_there in zip(tokens, row["attention_mask"], strict=True) if is_there]
        if not is_encoder_decoder:
            tokens = tokens[: _count_prompt_tokens(row.get("labels"), len(tokens))]
        tokens = [int(token) for token in tokens][-(self.max_prompt_length or len(tokens)) :]
        if not tokens:
            raise ValueError("prompt: it has no tokens.")
        return {**row, "input_ids": tokens, "attention_mask": [1] * len(tokens)}

    def generate(self, model: torch.nn.Module, inputs: Inputs, *, is_whole: bool = True) -> torch.Tensor:
        """Return the new tokens of each row, `[batch, max_new_tokens]`, padded after the row's end token.

        Args:
            model: a causal language model, or an encoder with a decoder.
            inputs: `input_ids` and `attention_mask` of the prompts, padded on either side, and perhaps other inputs.
            is_whole: whether these are the whole prompts. Otherwise they are their last tokens, without padding.
        """
        base = unwrap_model(model)
        prompts = dict(inputs)
        if is_whole:
            prompts = _align_padding(inputs, is_left=not base.config.is_encoder_decoder, token=self._padding)
        output = model.generate(**prompts, generation_config=self._configure(model))
        new = output[:, 1:] if base.config.is_encoder_decoder else output[:, prompts["input_ids"].shape[1] :]
        is_end = torch.isin(new, torch.tensor(self.find_end_tokens(model), device=new.device))
        is_after = is_end.cumsum(dim=1) - is_end.int() > 0
        return new.masked_fill(is_after, self._padding)

    def split_completions(self, model: torch.nn.Module, tokens: torch.Tensor) -> list[list[int]]:
        """Return the tokens of each row up to its end token, which is kept."""
        ends = set(self.find_end_tokens(model))
        return [_cut_after_end(row, ends) for row in tokens.tolist()]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of a completion, without special tokens, up to the first stop string."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        places = [text.find(stop) for stop in self.stop_strings]
        return text[: min((place for place in places if place >= 0), default=len(text))]

    def find_end_tokens(self, model: torch.nn.Module) -> list[int]:
        """Return the tokens that end a completion: those of the tokenizer and of the model's `generation_config`."""
        stated = unwrap_model(model).generation_config.eos_token_id
        several = stated if isinstance(stated, list) else [stated]
        return [token for token in dict.fromkeys([self.tokenizer.eos_token_id, *several]) if token is not None]

    def _encode_prompt(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        continues = prompt[-1]["role"] == "assistant"
        encoded = self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=not continues, continue_final_message=continues, return_dict=True
        )
        return encoded["input_ids"]

    def _configure(self, model: torch.nn.Module) -> GenerationConfig:
        ends = (self.find_end_tokens(model) if self.ends_early else None) or _NEVER
        sampling = {} if self.temperature is None else {"temperature": self.temperature}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=0,
            do_sample=self.temperature is not None,
            **sampling,
            num_beams=1,
            use_cache=self.max_new_tokens > 1,  # A single token needs none, and layers that need not fill one may rest.
            eos_token_id=ends,
            pad_token_id=self._padding,
            return_dict_in_generate=False,
        )

    @property
    def _padding(self) -> int:
        tokenizer = self.tokenizer
        return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def _count_prompt_tokens(labels: Any, tokens: int) -> int:
    """Return the number of tokens before the first label; all if no label stands behind a prompt.

    >>> _count_prompt_tokens([-100, -100, 7], 3), _count_prompt_tokens([7, 8, 9], 3), _count_prompt_tokens(1, 3)
    (2, 3, 3)
    """
    targets = [int(label) for label in labels] if isinstance(labels, list | torch.Tensor) and len(labels) else []
    if len(targets) != tokens or targets[0] != IGNORE_INDEX:
        return tokens
    return next((place for place, label in enumerate(targets) if label != IGNORE_INDEX), tokens)


def _align_padding(inputs: Inputs, *, is_left: bool, token: int) -> dict[str, Any]:
    """Return `inputs` padded on one side, and among several rows by one column more than the longest row needs.

    transformers skips a mask that masks nothing. Without that column, the lengths of a row's neighbours would choose
    the kernel that evaluates it.
    """
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    order = torch.argsort(mask if is_left else 1 - mask, dim=1, stable=True)
    tokens, mask = tokens.gather(1, order), mask.gather(1, order)
    if len(tokens) > 1:
        sides = (1, 0) if is_left else (0, 1)
        tokens = torch.nn.functional.pad(tokens, sides, value=token)
        mask = torch.nn.functional.pad(mask, sides, value=0)
    return {**inputs, "input_ids": tokens, "attention_mask": mask}


def _cut_after_end(tokens: list[int], ends: set[int]) -> list[int]:
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]
