"""What a step costs when frozen work is done once, beside an earlier checkout, DP-SGD, and bare forward passes.

    python benchmarks/frozen.py --against ../another_checkout

The model has the shape of SmolLM2-135M and random weights; a batch is 16 rows of 40 tokens, of which the last four
invoke the activated adapter; the loss is that of two label words. Each contender is measured in a process of its own,
on one thread, in turns. Seconds are medians over the steps after the first, and ratios are medians over rounds. The
other checkout trains an ordinary LoRA on the same layers. DP-SGD, by Opacus, needs
`pip install --no-deps -r benchmarks/steps/requirements.txt`.
"""

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


HERE = Path(__file__).parents[1]
sys.path[:0] = [str(HERE / "benchmarks"), str(HERE / "benchmarks" / "steps")]
ROWS, TOKENS, INVOCATION, WORDS = 16, 40, [11, 12, 13, 14], (5, 6)
UPPER = list(range(20, 30))
SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SHAPE |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "pad_token_id": 2}
ACTIVATED = {"alora_invocation_tokens": INVOCATION}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is measured.

    Args:
        name: its name in the table.
        kind: ours, other (an earlier checkout), dp-sgd, or floor, which is two bare forward passes.
        directions: the number of directions of a step.
        lora: options of the adapter.
        arguments: further training arguments.
        baseline: the contender that it is compared with.
    """

    name: str
    kind: str = "ours"
    directions: int = 16
    lora: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None


UPPER_LORA = {"layers_to_transform": UPPER}
CONTENDERS = (
    Contender(name="bare passes", kind="floor"),
    Contender(name="before: upper third", kind="other", lora=UPPER_LORA),
    Contender(name="before: all layers", kind="other"),
    Contender(name="DP-SGD, all layers", kind="dp-sgd"),
    Contender(name="LoRA, upper third", lora=UPPER_LORA, baseline="before: upper third"),
    Contender(name="activated LoRA, all layers", lora=ACTIVATED, baseline="before: all layers"),
    Contender(
        name="activated LoRA, upper third, rows seen before",
        lora={**ACTIVATED, **UPPER_LORA},
        arguments={"frozen_cache": "memory"},
        baseline="before: upper third",
    ),
    Contender(name="activated LoRA, all layers, K = 1", directions=1, lora=ACTIVATED, baseline="DP-SGD, all layers"),
)


def measure(contender: Contender, checkout: Path, steps: int) -> dict[str, float]:
    """Return the median seconds of a step, and the peak of resident memory in MiB. Runs in a process of its own."""
    import torch
    from datasets import Dataset
    from meter import Meter
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"], **contender.lora)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), config).eval()
    tokens = torch.randint(20, SHAPE["vocab_size"], (ROWS, TOKENS - len(INVOCATION))).tolist()
    rows = [
        {"input_ids": [*row, *INVOCATION], "attention_mask": [1] * TOKENS, "labels": number % 2}
        for number, row in enumerate(tokens)
    ]
    is_flat = not (checkout / "hf_dpzo" / "losses").is_dir()
    prompting = importlib.import_module("hf_dpzo.prompting" if is_flat else "hf_dpzo.losses.prompting")
    loss = prompting.NextWordLoss(words=WORDS, model=model)
    meter = Meter()
    if contender.kind in ("floor", "dp-sgd"):
        repeat_bare(contender.kind, model, rows, loss, steps, meter)
    else:
        train(contender, model, Dataset.from_list(rows), loss, steps, meter)
    return meter.result()


def repeat_bare(kind: str, model: Any, rows: list[dict], loss: Any, steps: int, meter: Any) -> None:
    """Repeat two bare forward passes, or steps of DP-SGD."""
    from contenders import dp_sgd, floor
    from datasets import Dataset
    from subjects import Subject
    from transformers import default_data_collator

    subject = Subject(model=model, rows=Dataset.from_list(rows), inputs=default_data_collator(rows), loss=loss)
    if kind == "floor":
        floor(subject, steps, meter)
    else:
        dp_sgd(subject, steps, meter, clipping="hooks")


def train(contender: Contender, model: Any, rows: Any, loss: Any, steps: int, meter: Any) -> None:
    """Take steps of `ZOTrainer`, of whichever checkout is imported."""
    from transformers import TrainerCallback

    from hf_dpzo import ZOTrainer, ZOTrainingArguments

    class Laps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 0:
                meter.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            meter.lap()

    several = {"num_directions": contender.directions} if contender.directions > 1 else {}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "method": "aggzo" if several else "dpzero",
            "noise_multiplier": 1.0,
            "target_delta": 1e-5,
            "smoothing": 1e-3,
            "learning_rate": 1e-6,
            "expected_batch_size": ROWS,  # As many as there are, so that each row joins every batch.
            "per_device_train_batch_size": ROWS,
            "max_steps": steps + 1,
            "output_dir": folder,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = ZOTrainingArguments(**settings, **several, **contender.arguments)
        ZOTrainer(model=model, args=args, train_dataset=rows, per_example_loss=loss, callbacks=[Laps()]).train()


def run_worker(contender: Contender, checkout: Path, steps: int) -> dict[str, float]:
    """Return what a fresh process measures."""
    paths = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--worker", contender.name, "--checkout", str(checkout)]
    ran = subprocess.run(
        [*command, "--steps", str(steps)], env=environment, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise RuntimeError(f"{contender.name}: {ran.stderr.splitlines()[-1]}")
    return json.loads(ran.stdout.splitlines()[-1])


def compare(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return the lines of the table."""
    from shared import table

    rows = []
    for contender in CONTENDERS:
        own = found.get(contender.name, [])
        base = found.get(contender.baseline or contender.name, [])
        if not own or not base:
            continue
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(own, base, strict=True)]
        peaks = [one["peak"] / other["peak"] for one, other in zip(own, found["bare passes"], strict=True)]
        shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        seconds = f"{statistics.median(one['seconds'] for one in own):.2f}"
        memory = f"{statistics.median(peaks):.2f}"
        rows.append((contender.name, seconds, contender.baseline or "", shown if contender.baseline else "", memory))
    return table(("contender", "seconds a step", "beside", "time", "peak memory over bare passes"), rows)


def main(arguments: Sequence[str]) -> None:
    """Measure all contenders in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="an earlier checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--checkout", type=Path, default=HERE, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.worker is not None:
        contender = next(one for one in CONTENDERS if one.name == asked.worker)
        sys.stdout.write(f"\n{json.dumps(measure(contender, asked.checkout, asked.steps))}\n")
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(asked.rounds):
        for contender in CONTENDERS:
            checkout = asked.against if contender.kind == "other" else HERE
            if checkout is not None and (contender.kind != "dp-sgd" or importlib.util.find_spec("opacus")):
                measured = run_worker(contender, checkout.resolve(), asked.steps)
                found.setdefault(contender.name, []).append(measured)
                sys.stderr.write(f"{contender.name}: {measured}\n")
    sys.stdout.write("\n".join(compare(found)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
