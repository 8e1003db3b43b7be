"""What untouched prompts reach on held-out rows."""

import sys
from pathlib import Path
from typing import Any

import torch

from hf_dpzo.models.public_texts import PUBLIC_TEXTS
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.run import build_trainer


# Templates and label words of which the best is what untouched prompts reach.
TEMPLATES = (
    "Review: {text}\nSentiment:",
    "{text} It was",
    "Review: {text}\nIs this review positive or negative? Answer:",
    "Review: {text}\nThe sentiment of this review is",
    "Movie review: {text}\nRating:",
    "{text}\nAll in all, it was",
    # With two examples, which are made up.
    "Review: A dull, lifeless mess.\nSentiment: negative\n"
    "Review: A moving, funny and clever film.\nSentiment: positive\n"
    "Review: {text}\nSentiment:",
)
WORDS = (
    (" negative", " positive"),
    (" Negative", " Positive"),
    (" bad", " good"),
    (" terrible", " great"),
    (" poor", " excellent"),
    (" no", " yes"),
)


@torch.no_grad()
def measure_prompts(path: Path, flags: list[str]) -> list[tuple[str, ...]]:
    """Return what untouched prompts reach on held-out rows, the best first: as they are, and centred by public text.

    Centred is what compares the difference of two words' scores with its median over public texts.
    """
    lines = []
    for template in TEMPLATES:
        recipe, args = read_recipe(path, [*flags, f"--template={template}", "--max_length=128", "--padded_lengths=128"])
        trainer = build_trainer(recipe, args)
        tokenizer = trainer.processing_class
        words = [[tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in pair] for pair in WORDS]
        public = [recipe.prompt.encode({"text": text}, tokenizer, recipe.max_length) for text in PUBLIC_TEXTS]
        labels = torch.tensor(trainer.eval_dataset["labels"])
        found, centre = (compute_margins(trainer, rows, words) for rows in (trainer.eval_dataset, public))
        for number, pair in enumerate(WORDS):
            rights = [((found[:, number] > at) == labels.bool()) for at in (0, centre[:, number].median())]
            shares = [f"{right.float().mean():.3f}" for right in rights]
            lines.append((repr(template), "/".join(pair), *shares))
            sys.stderr.write(f"{lines[-1]}\n")
    return sorted(lines, key=lambda line: line[2], reverse=True)


def compute_margins(trainer: Any, rows: Any, words: list[list[int]]) -> torch.Tensor:
    """Return how much higher the second word of each pair is scored after each row than the first, `[rows, pairs]`."""
    margins = []
    for start in range(0, len(rows), 32):
        inputs = trainer.data_collator([rows[i] for i in range(start, min(start + 32, len(rows)))])
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits = trainer.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        margins.append(torch.stack([logits[:, one[1]] - logits[:, one[0]] for one in words], dim=1))
    return torch.cat(margins)
