"""The tables of docs/heads.md: what a run trains on by default, for each kind of head.

    python benchmarks/heads.py

writes them into the page anew, from the heads that `hf_dpzo` knows and the tables of the installed transformers.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto import modeling_auto

from hf_dpzo.losses.heads import HEADS, OTHER_HEAD, Head
from hf_dpzo.trajectory.base_model import MODELS


PAGE = Path(__file__).parents[1] / "docs/heads.md"


# The lines between which the page's tables stand.
BEGIN, END = "<!-- tables: python benchmarks/heads.py -->", "<!-- end of tables -->"


# What a row holds beside its inputs, by the kind of its labels.
LABELS = {
    "class": "`labels`: a class, a number, or several of them",
    "classes of tokens": "`labels`: a class for each token, -100 for none",
    "places": "`start_positions` and `end_positions`",
    "choice": "`labels`: the number of the right choice; `input_ids`: a list for each choice",
    "written tokens": "`labels`: the tokens to write, -100 for none",
    "read tokens": "`labels`: the tokens themselves, -100 where there is no target",
    "any": "whatever the model's `forward` takes as labels",
}


# Well-known families, of which the tables name those that have the head.
FAMILIES = ("Bart", "Bert", "GPT2", "Llama", "ResNet", "T5", "VideoMAE", "ViT", "Wav2Vec2", "Whisper")


def find_auto_class(table: str) -> str:
    """Return the name of the auto class whose table in transformers is `table`.

    >>> find_auto_class("SEQUENCE_CLASSIFICATION")
    'AutoModelForSequenceClassification'
    """
    mapping = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING")
    classes = {name: kind for name, kind in vars(modeling_auto).items() if inspect.isclass(kind)}
    return next(name for name, kind in classes.items() if getattr(kind, "_model_mapping", None) is mapping)


def list_examples(head: Head) -> str:
    """Return the classes of well-known families that have `head`, in words."""
    known = sorted(name for name in head.architectures if name.partition("For")[0] in FAMILIES)
    return ", ".join(f"`{name}`" for name in known[:4])


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |\n"


def build_heads() -> Iterator[str]:
    """Yield the lines of the table of heads."""
    yield row("what it does", "auto class", "a row holds", "loss", "for example")
    yield row(*["---"] * 5)
    for head in (*HEADS, OTHER_HEAD):
        autos = ", ".join(f"`{find_auto_class(table)}`" for table in head.tables) or "any model that returns a loss"
        yield row(head.task, autos, LABELS[head.labels], f"`{head.loss.__name__}`", list_examples(head))


def build_losses() -> Iterator[str]:
    """Yield the lines of the table of the losses in transformers, and of what stands for each here."""
    yield row("in `LOSS_MAPPING`", "here", "checked by `hf-dpzo verify` without a model of yours")
    yield row(*["---"] * 3)
    first = {kind: head.loss.__name__ for head in reversed(HEADS) for kind in head.architectures}
    for name in LOSS_MAPPING:
        losses = sorted({loss for kind, loss in first.items() if kind.endswith(name)}) or [OTHER_HEAD.loss.__name__]
        is_replayed = any(kind.endswith(name) for kind in MODELS)
        yield row(f"`{name}`", ", ".join(f"`{loss}`" for loss in losses), "yes" if is_replayed else "no")


def build_page(page: str) -> str:
    """Return `page` with its tables written anew."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{''.join(build_heads())}\n{''.join(build_losses())}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(build_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
