"""One class for each text, by a new head on what one layer of a frozen model says of it."""

from typing import TYPE_CHECKING, Any

from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_dpzo.losses.template import Template
from hf_dpzo.models.feature_classifier import POSITIONS, FeatureClassifier
from hf_dpzo.models.public_texts import PUBLIC_TEXTS
from hf_dpzo.recipe.tasks.labels import name_outputs
from hf_dpzo.recipe.tasks.sequence_classification import SequenceClassification


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


# Fields of an adapter, which a head does without.
ADAPTER_FIELDS = ("lora_target_modules", "lora_layers", "lora_freeze_a")


class FeatureClassification(SequenceClassification):
    """A linear head is all that is trained. With `label_words`, it begins at these words' direction.

    Features are centred and scaled by made-up texts in the template, so that no private row decides by what.
    """

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` unless there are classes, and nothing is asked of an adapter."""
        super().check(recipe)
        for name in ADAPTER_FIELDS:
            if getattr(recipe, name):
                raise ValueError(f"{name}={getattr(recipe, name)}: a head on features has no adapter; remove it.")
        if recipe.position not in (None, *POSITIONS):
            raise ValueError(f"position={recipe.position!r}: choose one of {', '.join(POSITIONS)}.")
        if recipe.words and len(recipe.words) != len(recipe.labels):
            raise ValueError("label_words: name a word for each class, or none; it is {class: word}.")

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of models without a head, or of language models where words are the head's beginning."""
        return AutoModelForCausalLM if recipe.words else AutoModel

    def model_options(self, recipe: "Recipe") -> dict[str, Any]:
        """Return nothing: the classes are those of the new head."""
        return {}

    def build_head(
        self, model: PreTrainedModel, recipe: "Recipe", tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel | None:
        """Return a new head on `model`."""
        template = Template(template=recipe.template)
        rows = [dict.fromkeys(template.fields, text) for text in PUBLIC_TEXTS]
        head = FeatureClassifier.on_base(
            model,
            tokenizer,
            id2label=name_outputs(recipe)["id2label"],
            layer=recipe.layer,
            position=recipe.position or POSITIONS[0],
            texts=[template.encode(row, tokenizer, recipe.max_length)["input_ids"] for row in rows],
            words=recipe.words or None,
        )
        head.config.pad_token_id = model.config.pad_token_id
        return head

    def name_trained(self, recipe: "Recipe") -> str:
        """Return what is trained and saved."""
        return "head"


def refuse_unread_fields(recipe: "Recipe") -> None:
    """Raise `ValueError` for fields of a head on features in a recipe of another task, which would ignore them."""
    for name in () if isinstance(recipe.kind, FeatureClassification) else ("layer", "position"):
        if getattr(recipe, name) is not None:
            raise ValueError(
                f"{name}={getattr(recipe, name)}: only feature-classification reads features; set task, or remove it."
            )
