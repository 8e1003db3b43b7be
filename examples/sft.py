"""Fine-tunes a chat model on private conversations, by TRL's preparation of data: LoRA on a causal language model.

    python examples/sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --train_file chats.jsonl \
        --eval_file public.jsonl --output_dir out/chat --method aggzo --num_directions 16 --target_epsilon 8 \
        --target_delta 1e-5 --expected_batch_size 64 --max_steps 200 --learning_rate 1e-2 --smoothing 1e-2

Each line has `messages`: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
A line is one conversation, and that is what the guarantee protects. It needs `pip install "hf_dpzo[trl]"`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_dpzo import seeded_peft_model
from hf_dpzo.trl import ZOSFTConfig, ZOSFTTrainer


@dataclass
class Arguments:
    """What is trained, and on which conversations."""

    model_name_or_path: str = field(metadata={"help": "A model on the Hub, or a folder."})
    train_file: str = field(metadata={"help": "The private conversations, as JSON lines."})
    eval_file: str | None = field(default=None, metadata={"help": "Others, on which the loss is measured."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and save."""
    arguments, training = HfArgumentParser((Arguments, ZOSFTConfig)).parse_args_into_dataclasses(argv)
    files = {"train": arguments.train_file} | ({"test": arguments.eval_file} if arguments.eval_file else {})
    rows = load_dataset("json", data_files=files)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype="float32")
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules=["q_proj", "v_proj"])
    trainer = ZOSFTTrainer(
        model=seeded_peft_model(model, config, seed=training.seed, freeze_a=True),
        args=training,
        train_dataset=rows["train"],
        eval_dataset=rows.get("test"),
        processing_class=AutoTokenizer.from_pretrained(arguments.model_name_or_path),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if arguments.eval_file:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
