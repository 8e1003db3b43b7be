"""Trains a tagger of words, such as names in notes: LoRA and a new head on an encoder.

    python examples/token_classification.py --model_name_or_path google-bert/bert-base-uncased \
        --train_file train.jsonl --eval_file test.jsonl --labels O PERSON PLACE --output_dir out/names --method aggzo \
        --num_directions 16 --target_epsilon 4 --target_delta 1e-5 --expected_batch_size 128 --max_steps 200 \
        --learning_rate 1e-2

Each line of a file has `words` and as many `tags`: {"words": ["Ada", "writes"], "tags": ["PERSON", "O"]}. A row is one
line, and that is what the guarantee protects: if a person is in several lines, name the column that says who wrote
them by `--privacy_unit_column`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForTokenClassification, AutoTokenizer, EvalPrediction, HfArgumentParser

from hf_dpzo import ZOTrainer, ZOTrainingArguments, seeded_peft_model


IGNORED = -100


@dataclass
class Arguments:
    """What is trained, and on which words."""

    model_name_or_path: str = field(metadata={"help": "A model on the Hub, or a folder, with a fast tokenizer."})
    train_file: str = field(metadata={"help": "The private lines, as JSON."})
    eval_file: str = field(metadata={"help": "Other lines."})
    labels: list[str] = field(metadata={"help": "All tags."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that LoRA adapts; by default those that PEFT knows for the model."}
    )
    max_length: int = field(default=128, metadata={"help": "The tokens of a line that are read."})


def measure(found: EvalPrediction) -> dict[str, float]:
    """Return the share of words that are tagged right."""
    counted = found.label_ids != IGNORED
    return {"accuracy": (found.predictions.argmax(axis=-1) == found.label_ids)[counted].mean()}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and save."""
    arguments, training = HfArgumentParser((Arguments, ZOTrainingArguments)).parse_args_into_dataclasses(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    numbers = {name: number for number, name in enumerate(arguments.labels)}

    def encode(row: dict) -> dict:
        tokens = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=arguments.max_length)
        places = tokens.word_ids()
        # A word's first token has its tag.
        firsts = [place is not None and place != before for place, before in zip(places, [None, *places], strict=False)]
        tags = [numbers[row["tags"][place]] if first else IGNORED for place, first in zip(places, firsts, strict=True)]
        return {**tokens, "labels": tags}

    rows = load_dataset("json", data_files={"train": arguments.train_file, "test": arguments.eval_file})
    unit = training.privacy_unit_column
    rows = rows.map(encode, remove_columns=[name for name in rows["train"].column_names if name != unit])
    names = dict(enumerate(arguments.labels))
    model = AutoModelForTokenClassification.from_pretrained(arguments.model_name_or_path, id2label=names)
    config = LoraConfig(task_type=TaskType.TOKEN_CLS, r=8, target_modules=arguments.lora_target_modules)
    trainer = ZOTrainer(
        model=seeded_peft_model(model, config, seed=training.seed, freeze_a=True),
        args=training,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        compute_metrics=measure,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
