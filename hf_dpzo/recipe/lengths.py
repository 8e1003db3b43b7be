"""How many tokens a row may have, so that the model does not fail on it."""

import torch
from transformers import PreTrainedTokenizerBase

from hf_dpzo.recipe.recipe import Recipe
from hf_dpzo.trainer.foreseeing import has_few_positions


def find_longest_row(model: torch.nn.Module, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return `max_length`, or what the model has positions for if that is less; label words are counted.

    A model whose table of positions may be too small is tried on made-up rows.
    """
    words = [len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in recipe.words]
    spare = max(words) if recipe.uses_prompt and not recipe.fills_mask and max(words) > 1 else 0
    if not has_few_positions(model, recipe.max_length + spare) or _fits(model, recipe.max_length + spare):
        return recipe.max_length
    fitting, failing = 0, recipe.max_length + spare
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if _fits(model, middle) else (fitting, middle)
    return fitting - spare if fitting > spare else recipe.max_length  # It may fail for another reason.


@torch.no_grad()
def _fits(model: torch.nn.Module, length: int) -> bool:
    """Return whether a forward pass of one made-up row of `length` tokens succeeds."""
    device = next(model.parameters()).device
    row = torch.full((1, length), 5, device=device)
    was_training = model.training
    model.eval()
    try:
        model(input_ids=row, attention_mask=torch.ones_like(row))
    except (IndexError, RuntimeError, ValueError):
        return False
    finally:
        model.train(was_training)
    return True
