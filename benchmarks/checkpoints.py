"""What a checkpoint costs on disk, beside the stock Trainer's, and what the log of a run costs.

    python benchmarks/checkpoints.py

The model is that of lora.yaml. Each trainer takes one step and saves one checkpoint, for an adapter and for all
parameters; the stock one uses AdamW, its default.
"""

import sys
import tempfile
from pathlib import Path

from shared import LORA_RECIPE, LoraRun, table
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.run import build_trainer
from hf_dpzo.trajectory.log import Trajectory


COMMON = ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--disable_tqdm", "true"]
TITLES = ("trained", "weights", "else, ours", "else, stock", "ours / stock", "log: header", "log: a step")
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
# Of the tokenizer: the same for both, and no part of the state of a run.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def ours(adapter: str, folder: str) -> tuple[Path, Trajectory]:
    """Take one private zeroth-order step; return the checkpoint and the log."""
    recipe, args = read_recipe(LORA_RECIPE, [*COMMON, "--adapter", adapter, "--output_dir", folder])
    build_trainer(recipe, args).train()
    return Path(folder) / "checkpoint-1", Trajectory.read(folder)


def stock(adapter: str, folder: str) -> Path:
    """Take one step of AdamW; return the checkpoint."""
    start = LoraRun.load(*COMMON, "--adapter", adapter)
    settings = TrainingArguments(
        output_dir=folder, max_steps=1, save_steps=1, report_to="none", use_cpu=start.args.use_cpu, disable_tqdm=True
    )
    Trainer(
        model=start.model(),
        args=settings,
        train_dataset=start.train.remove_columns("labels"),
        data_collator=DataCollatorForLanguageModeling(start.tokenizer, mlm=False),
        processing_class=start.tokenizer,
    ).train()
    return Path(folder) / "checkpoint-1"


def sizes(checkpoint: Path) -> tuple[int, int]:
    """Bytes of the weights, and of everything else but the tokenizer."""
    files = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    weights = sum(size for name, size in files.items() if name in WEIGHTS)
    return weights, sum(size for name, size in files.items() if name not in (*WEIGHTS, *TOKENIZER))


def main() -> None:
    """Measure, and print a Markdown table."""
    rows = []
    for adapter, name in (("lora", "adapter"), ("none", "all parameters")):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, log = ours(adapter, f"{folder}/ours")
            weights, own = sizes(checkpoint)
            _, other = sizes(stock(adapter, f"{folder}/stock"))
            header = (Path(folder) / "ours" / "trajectory.zo").stat().st_size - log.layout.record_size
        ratio = (weights + own) / (weights + other)
        counts = [f"{count:,}" for count in (weights, own, other)]
        rows.append([name, *counts, f"{ratio:.2f}", f"{header:,}", str(log.layout.record_size)])
    sys.stdout.write("\n".join(table(TITLES, rows)) + "\n")


if __name__ == "__main__":
    main()
