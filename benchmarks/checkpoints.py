"""What a checkpoint costs on disk, beside the stock Trainer's, and what the log of a run costs.

    python benchmarks/checkpoints.py

The model is the quick start's. Each trainer takes one step and saves one checkpoint, for an adapter and for all
parameters; the stock one uses AdamW, its default.
"""

import sys
import tempfile
from pathlib import Path

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hf_dpzo.recipe.loading import load_model, load_rows, load_tokenizer
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.run import build_trainer
from hf_dpzo.trajectory.log import Trajectory


RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
COMMON = ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--disable_tqdm", "true"]
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
# Of the tokenizer: the same for both, and no part of the state of a run.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def ours(adapter: str, folder: str) -> tuple[Path, Trajectory]:
    """Take one private zeroth-order step; return the checkpoint and the log."""
    recipe, args = read_recipe(RECIPE, [*COMMON, "--adapter", adapter, "--output_dir", folder])
    build_trainer(recipe, args).train()
    return Path(folder) / "checkpoint-1", Trajectory.read(folder)


def stock(adapter: str, folder: str) -> Path:
    """Take one step of AdamW; return the checkpoint."""
    recipe, args = read_recipe(RECIPE, [*COMMON, "--adapter", adapter])
    tokenizer = load_tokenizer(recipe)
    rows, _ = load_rows(recipe, tokenizer)
    settings = TrainingArguments(
        output_dir=folder, max_steps=1, save_steps=1, report_to="none", use_cpu=args.use_cpu, disable_tqdm=True
    )
    Trainer(
        model=load_model(recipe, tokenizer, seed=0),
        args=settings,
        train_dataset=rows.remove_columns("labels"),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    ).train()
    return Path(folder) / "checkpoint-1"


def sizes(checkpoint: Path) -> tuple[int, int]:
    """Bytes of the weights, and of everything else but the tokenizer."""
    files = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    weights = sum(size for name, size in files.items() if name in WEIGHTS)
    return weights, sum(size for name, size in files.items() if name not in (*WEIGHTS, *TOKENIZER))


def main() -> None:
    """Measure, and print a Markdown table."""
    lines = [
        "| trained | weights | else, ours | else, stock | ours / stock | log: header | log: a step |",
        "|---" * 7 + "|",
    ]
    for adapter, name in (("lora", "adapter"), ("none", "all parameters")):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, log = ours(adapter, f"{folder}/ours")
            weights, own = sizes(checkpoint)
            _, other = sizes(stock(adapter, f"{folder}/stock"))
            header = (Path(folder) / "ours" / "trajectory.zo").stat().st_size - log.layout.size
        ratio = (weights + own) / (weights + other)
        lines.append(f"| {name} | {weights:,} | {own:,} | {other:,} | {ratio:.2f} | {header:,} | {log.layout.size} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
