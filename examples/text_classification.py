"""Trains a classifier of texts, as GLUE's are: LoRA and a new head on an encoder or a decoder.

    python examples/text_classification.py --model_name_or_path google-bert/bert-base-uncased --train_file train.csv \
        --eval_file test.csv --output_dir out/texts --method aggzo --num_directions 16 --target_epsilon 2 \
        --target_delta 1e-5 --expected_batch_size 256 --max_steps 200 --learning_rate 1e-2 --smoothing 1e-2

Files are CSV, JSON lines or Parquet with the columns `text` and `label`. `accelerate launch --num_processes 2` in place
of `python` shares each batch between two processes; the guarantee stays the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import ClassLabel, load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from hf_dpzo import ZOTrainer, ZOTrainingArguments, seeded_peft_model


BUILDERS = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


@dataclass
class Arguments:
    """What is trained, and on which texts."""

    model_name_or_path: str = field(metadata={"help": "A model on the Hub, or a folder."})
    train_file: str = field(metadata={"help": "The private rows."})
    eval_file: str = field(metadata={"help": "Other rows with the same labels."})
    labels: list[str] = field(default_factory=lambda: ["0", "1"], metadata={"help": "The labels, as in the files."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that LoRA adapts; by default those that PEFT knows for the model."}
    )
    max_length: int = field(default=128, metadata={"help": "The tokens of a text that are read."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and save."""
    arguments, training = HfArgumentParser((Arguments, ZOTrainingArguments)).parse_args_into_dataclasses(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    classes = ClassLabel(names=arguments.labels)

    def encode(row: dict) -> dict:
        tokens = tokenizer(str(row["text"]), truncation=True, max_length=arguments.max_length)
        return {**tokens, "labels": classes.str2int(str(row["label"]))}

    files = {"train": arguments.train_file, "test": arguments.eval_file}
    rows = load_dataset(BUILDERS[arguments.train_file.rpartition(".")[2]], data_files=files)
    rows = rows.map(encode, remove_columns=rows["train"].column_names)
    names = dict(enumerate(arguments.labels))
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model_name_or_path, id2label=names)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=arguments.lora_target_modules)
    trainer = ZOTrainer(
        model=seeded_peft_model(model, config, seed=training.seed, freeze_a=True),
        args=training,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(axis=-1) == found.label_ids).mean()},
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
