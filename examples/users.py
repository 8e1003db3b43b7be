"""Trains a head on messages of users, of whom each has several: the guarantee protects all of a user's messages.

    python examples/users.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --train_file messages.csv \
        --privacy_unit_column user --max_rows_per_unit 4 --output_dir out/users --method aggzo --num_directions 64 \
        --clip_norm 0.05 --smoothing 0.1 --learning_rate 20 --expected_batch_size all --max_steps 160 \
        --target_epsilon 2 --target_delta 1e-5

The file has the columns `user`, `text` and `label` (0 or 1). The model stays frozen; what it says of each message is
computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_dpzo import PUBLIC_TEXTS, FeatureClassifier, ZOTrainer, ZOTrainingArguments


@dataclass
class Arguments:
    """What is trained, and on which messages."""

    model_name_or_path: str = field(metadata={"help": "A model on the Hub, or a folder."})
    train_file: str = field(metadata={"help": "The private messages, as CSV."})
    template: str = field(default="Message: {text}\nAbout:", metadata={"help": "The text of a row."})
    max_length: int = field(default=64, metadata={"help": "The tokens of a text that are read."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save."""
    arguments, training = HfArgumentParser((Arguments, ZOTrainingArguments)).parse_args_into_dataclasses(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, padding_side="right")

    def encode(row: dict) -> dict:
        text = arguments.template.format(text=row["text"])
        return {**tokenizer(text, truncation=True, max_length=arguments.max_length), "labels": int(row["label"])}

    rows = load_dataset("csv", data_files={"train": arguments.train_file})["train"]
    rows = rows.map(encode, remove_columns=["text", "label"])
    base = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype="float32")
    # Features are centred and scaled by public texts in the form of the rows.
    texts = [arguments.template.format(text=text) for text in PUBLIC_TEXTS]
    trainer = ZOTrainer(
        model=FeatureClassifier.on_base(base, tokenizer, id2label={0: "no", 1: "yes"}, texts=texts),
        args=training,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
