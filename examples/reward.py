"""Teaches a model to answer in a form that a rule checks, from nothing but the rule: there is no gradient.

    python examples/reward.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --train_file prompts.jsonl \
        --output_dir out/short --method aggzo --num_directions 16 --target_epsilon 4 --target_delta 1e-5 \
        --expected_batch_size 64 --max_steps 40 --learning_rate 1 --smoothing 0.1 --clip_norm 0.15 \
        --per_device_train_batch_size 1

Each line has a `prompt`. The rule here asks for an answer of one sentence; write your own in its place, or pass any
function that was written for TRL's GRPOTrainer. A judge that sees private text must run where that text may be.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_dpzo import PUBLIC_TEXTS, ZOTrainer, ZOTrainingArguments, seeded_peft_model
from hf_dpzo.losses import GenerationReward


@dataclass
class Arguments:
    """What is trained, and on which prompts."""

    model_name_or_path: str = field(metadata={"help": "A model on the Hub, or a folder."})
    train_file: str = field(metadata={"help": "The private prompts, as JSON lines."})
    max_new_tokens: int = field(default=16, metadata={"help": "The tokens of an answer."})


def reward_one_sentence(completions: list[str], **columns: list) -> list[float]:
    """Return 1 for each text of one sentence, less for each further one."""
    return [1.0 / max(1, sum(text.count(end) for end in ".!?")) for text in completions]


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save."""
    arguments, training = HfArgumentParser((Arguments, ZOTrainingArguments)).parse_args_into_dataclasses(argv)
    rows = load_dataset("json", data_files={"train": arguments.train_file})
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype="float32")
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["o_proj", "down_proj"])
    trainer = ZOTrainer(
        # What +z gains, -z has to lose; with both matrices of LoRA moving, most of a metric's difference cancels.
        model=seeded_peft_model(model, config, seed=training.seed, freeze_a=True),
        args=training,
        train_dataset=rows["train"].select_columns("prompt"),
        processing_class=AutoTokenizer.from_pretrained(arguments.model_name_or_path),
        # Public prompts, by which everything is tried before a private one is read.
        probe_rows=[{"prompt": text} for text in PUBLIC_TEXTS],
        per_example_loss=GenerationReward(reward_one_sentence, max_new_tokens=arguments.max_new_tokens),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
