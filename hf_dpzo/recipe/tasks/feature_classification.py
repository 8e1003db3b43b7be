"""One class for each text, by a new head on what one layer of a frozen model says of it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from hf_dpzo.losses.template import Template
from hf_dpzo.models.feature_classifier import POSITIONS, FeatureClassifier
from hf_dpzo.models.public_texts import PUBLIC_TEXTS
from hf_dpzo.recipe.defaults import TrainingDefaults
from hf_dpzo.recipe.tasks.labels import name_outputs
from hf_dpzo.recipe.tasks.sequence_classification import SequenceClassification


if TYPE_CHECKING:
    from hf_dpzo.recipe.recipe import Recipe


# Measured on the tasks of the study: see benchmarks/README.md. With this limit of noise, heads on 1,024 rows at
# epsilon 0.5 are two points more accurate on two of three tasks, and as accurate on the third.
HEAD_DEFAULTS = TrainingDefaults(
    method="aggzo",
    expected_batch_size="all",
    num_directions=64,
    clip=0.4,
    smoothing=0.1,
    most_noise=16,
    max_steps=160,
)
# The more classes there are, the less each one's weights feel of a row.
RATE_PER_CLASS = 10.0


# Fields of an adapter, which a head does without.
ADAPTER_FIELDS = ("lora_target_modules", "lora_layers", "lora_freeze_a")


class FeatureClassification(SequenceClassification):
    """A linear head is all that is trained. With `label_words`, the untouched model is measured by these beside it.

    Features are centred and scaled by made-up texts in the template, so that no private row decides by what.
    """

    has_new_head = True

    def check(self, recipe: "Recipe") -> None:
        """Raise `ValueError` unless there are classes, and nothing is asked of an adapter."""
        super().check(recipe)
        for name in ADAPTER_FIELDS:
            if getattr(recipe, name):
                raise ValueError(f"{name}={getattr(recipe, name)}: a head on features has no adapter; remove it.")
        if recipe.position not in (None, *POSITIONS):
            raise ValueError(f"position={recipe.position!r}: choose one of {', '.join(POSITIONS)}.")
        if recipe.words:
            _ = recipe.prompt  # It checks itself.
        elif recipe.untouched_template is not None:
            raise ValueError(
                f"untouched_template={recipe.untouched_template!r}: the untouched model is measured by label_words; "
                "name them, or remove this."
            )
        self._refuse_other_columns(recipe)

    @staticmethod
    def _refuse_other_columns(recipe: "Recipe") -> None:
        """Raise `ValueError` if `untouched_template` reads other columns, by which other rows would be held out."""
        others = set(Template(template=recipe.untouched_template or recipe.template).fields)
        if not others <= set(Template(template=recipe.template).fields):
            raise ValueError(
                f"untouched_template={recipe.untouched_template!r}: it names a column that template does not; name "
                "those of template alone."
            )

    def defaults(self, recipe: "Recipe") -> TrainingDefaults:
        """Return settings of a head that takes all rows and many directions in each step."""
        return replace(HEAD_DEFAULTS, learning_rate=RATE_PER_CLASS * len(recipe.labels))

    def auto_class(self, recipe: "Recipe") -> type:
        """Return the class of models without a head."""
        return AutoModel

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
            position=recipe.position,
            texts=[template.encode(row, tokenizer, recipe.max_length)["input_ids"] for row in rows],
        )
        head.config.pad_token_id = model.config.pad_token_id
        return head

    def name_trained(self, recipe: "Recipe") -> str:
        """Return what is trained and saved."""
        return "head"


def refuse_unread_fields(recipe: "Recipe") -> None:
    """Raise `ValueError` for fields of a head on features in a recipe of another task, which would ignore them."""
    own = ("layer", "position", "untouched_template")
    for name in () if isinstance(recipe.kind, FeatureClassification) else own:
        if getattr(recipe, name) is not None:
            raise ValueError(
                f"{name}={getattr(recipe, name)}: only feature-classification reads features; set task, or remove it."
            )
