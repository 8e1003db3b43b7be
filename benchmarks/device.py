"""Checks and times hf_dpzo on one device, next to bare forward passes, the memory's bandwidth and MeZO's scheme.

    python benchmarks/device.py                        # one GPU of 80 GB, at most six minutes
    python benchmarks/device.py --device cpu --quick   # the same with tiny shapes, to see that it runs

Models are of OPT's architecture with random weights, a batch is four rows of 64 random tokens, and losses are those of
label words. It prints tables that name the device, and writes all figures to `--output`. First it trains on the device
and replays the log on the CPU, and fails if one bit differs.
"""

import argparse
import copy
import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Before torch looks: with several, the Trainer would use them all.
sys.path.insert(0, str(Path(__file__).parent / "steps"))

import torch
from datasets import Dataset
from mezo_twin import MezoTwin
from peft import LoraConfig
from shared import table
from stopwatch import Stopwatch
from transformers import OPTConfig, OPTForCausalLM

from hf_dpzo import Trajectory, ZOTrainer, ZOTrainingArguments, replay_onto
from hf_dpzo.losses.prompting import NextWordLoss
from hf_dpzo.models.seeded import seeded_peft_model
from hf_dpzo.zo.device_signs import choose_triton
from hf_dpzo.zo.directions import Rademacher


WORDS, SMOOTHING = (5, 6), 1e-3
SHAPES = {
    "125M": {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1.3B": {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
    "2.7B": {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32},
}
QUICK = {
    "tiny": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Args:
        device: the device.
        shapes: the configuration of each model, by its name.
        rows: the number of rows of a batch.
        tokens: the number of tokens of a row.
        directions: the numbers of directions.
        steps: the number of steps of which the median is taken, after one that is not counted.
        until: the time, of `time.monotonic`, after which no case is begun.
    """

    device: torch.device
    shapes: dict[str, dict[str, int]]
    rows: int
    tokens: int
    directions: tuple[int, ...]
    steps: int
    until: float

    def build(self, shape: str, dtype: torch.dtype, *, lora: bool) -> torch.nn.Module:
        """Return a model with random weights, with an adapter in float32 if `lora`."""
        size = self.shapes[shape]
        torch.manual_seed(0)
        with self.device:
            config = OPTConfig(**size, word_embed_proj_dim=size["hidden_size"], dropout=0.0)
            model = OPTForCausalLM(config).to(dtype).eval()
        if not lora:
            return model
        adapter = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
        return seeded_peft_model(model, adapter, seed=0).eval()

    def batch(self, shape: str) -> Dataset:
        """Return the rows of a batch."""
        vocabulary = self.shapes[shape].get("vocab_size", 50_272)
        ids = torch.randint(10, vocabulary, (self.rows, self.tokens), generator=torch.Generator().manual_seed(0))
        rows = enumerate(ids.tolist())
        return Dataset.from_list(
            [{"input_ids": row, "attention_mask": [1] * self.tokens, "labels": i % 2} for i, row in rows]
        )


def collate(rows: list[dict[str, Any]], *, width: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to `width`, as public rows that are shortened ask for."""
    padded = {
        name: torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])
        for name, filler in (("input_ids", 1), ("attention_mask", 0))
    }
    return padded | {"labels": torch.tensor([row["labels"] for row in rows])}


def train(plan: Plan, model: torch.nn.Module, rows: Dataset, folder: str, steps: int, **others: Any) -> None:
    """Take steps of `ZOTrainer` in its own loop."""
    callbacks = others.pop("callbacks", [])
    settings = {"method": "dpzero", "learning_rate": 1e-6, "smoothing": SMOOTHING, **others}
    args = ZOTrainingArguments(
        **settings,
        noise_multiplier=1.0,
        target_delta=1e-5,
        expected_batch_size=len(rows),
        per_device_train_batch_size=len(rows),
        padded_lengths=[plan.tokens],  # Few bits ask for public shapes.
        max_steps=steps,
        output_dir=folder,
        save_strategy="no",
        report_to="none",
        use_cpu=plan.device.type == "cpu",
        disable_tqdm=True,
    )
    loss = NextWordLoss(words=WORDS, model=model)
    data = {"train_dataset": rows, "data_collator": functools.partial(collate, width=plan.tokens)}
    ZOTrainer(model=model, args=args, per_example_loss=loss, callbacks=callbacks, **data).train()


def check_bits(plan: Plan) -> bool:
    """Return whether a run on the device and the replay of its log on the CPU end at the same bits."""
    shape = next(iter(plan.shapes))
    model = plan.build(shape, torch.float32, lora=False)
    replayed = copy.deepcopy(model).cpu()
    with tempfile.TemporaryDirectory() as folder:
        train(plan, model, plan.batch(shape), folder, 3, learning_rate=1e-3, method="aggzo", num_directions=2)
        replay_onto(replayed, Trajectory.read(Path(folder)))
    pairs = zip(model.parameters(), replayed.parameters(), strict=True)
    return all(torch.equal(one.detach().cpu(), other.detach()) for one, other in pairs)


def measure_bandwidth(plan: Plan, numel: int) -> float:
    """Return the bytes a second of a copy, which reads and writes each byte once."""
    source = torch.zeros(numel, device=plan.device)
    target, watch = torch.empty_like(source), Stopwatch(plan.device)
    watch.repeat(lambda: target.copy_(source), 12)
    return 2 * source.nbytes / watch.seconds()


def measure_sweeps(plan: Plan, shape: str, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Yield the time of adding signs to all parameters, over that of reading and writing them once."""
    parameters = [p.detach() for p in plan.build(shape, torch.float32, lora=False).parameters()]
    directions = Rademacher(seed=0, sizes=[p.numel() for p in parameters])
    bound = 2 * sum(p.nbytes for p in parameters) / bandwidth
    for count in plan.directions:
        watch, weights = Stopwatch(plan.device), [dict.fromkeys(range(count), 1e-9)] * len(parameters)
        step = iter(range(100))
        watch.repeat(lambda: directions.add_all_(parameters, step=next(step), weights=weights), 6)  # noqa: B023
        yield {"shape": shape, "K": count, "seconds": watch.seconds(), "over": watch.seconds() / bound}


def measure_steps(plan: Plan, shape: str, *, lora: bool) -> Iterator[dict[str, Any]]:
    """Yield the time of a step over that of its bare forward passes, and its peak of memory over theirs."""
    rows = plan.batch(shape)
    inputs = {name: torch.tensor(rows[name], device=plan.device) for name in rows.column_names}
    what = "LoRA on bfloat16" if lora else "all in float32"
    for count in plan.directions:
        model = plan.build(shape, torch.bfloat16 if lora else torch.float32, lora=lora)  # No model is trained twice.
        bare, loss = Stopwatch(plan.device), NextWordLoss(words=WORDS, model=model)
        with torch.no_grad():
            bare.repeat(lambda: [loss(model, inputs) for _ in range(2 * count)], plan.steps + 1)  # noqa: B023
        ours = Stopwatch(plan.device)
        method = {"method": "aggzo", "num_directions": count} if count > 1 else {}
        with tempfile.TemporaryDirectory() as folder:
            train(plan, model, rows, folder, plan.steps + 1, callbacks=[ours], **method)
        yield _compare(shape, what, f"ours, K = {count}", ours, bare)
        if count == 1 and not lora:
            twin, mezo = MezoTwin(model, learning_rate=1e-6, eps=SMOOTHING), Stopwatch(plan.device)
            mezo.repeat(lambda: twin.step(loss, inputs), plan.steps + 1)  # noqa: B023
            yield _compare(shape, what, "MeZO as published", mezo, bare)


def _compare(shape: str, what: str, name: str, watch: Stopwatch, bare: Stopwatch) -> dict[str, Any]:
    peak, floor = watch.peak(), bare.peak()
    memory = None if peak is None or not floor else peak / floor
    seconds = {"seconds": watch.seconds(), "over": watch.seconds() / bare.seconds()}
    return {"shape": shape, "trained": what, "contender": name, **seconds, "peak": peak, "memory": memory}


def measure(plan: Plan) -> dict[str, Any]:
    """Return all figures; cases for which no time is left are named."""
    name = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else plan.device.type
    found: dict[str, Any] = {"device": name, "torch": torch.__version__}
    found["drawn by"] = "Triton" if choose_triton(plan.device, torch.float32) else "torch or NumPy"
    found["bits are those of the CPU"] = check_bits(plan)
    found["bandwidth"] = measure_bandwidth(plan, 1 << (28 if plan.device.type == "cuda" else 22))
    found |= {"sweeps": [], "steps": [], "left out": []}
    for shape in plan.shapes:
        cases = {
            "sweeps": lambda: measure_sweeps(plan, shape, found["bandwidth"]),  # noqa: B023
            "all": lambda: measure_steps(plan, shape, lora=False),  # noqa: B023
            "LoRA": lambda: measure_steps(plan, shape, lora=True),  # noqa: B023
        }
        for name, case in cases.items():
            if time.monotonic() > plan.until:
                found["left out"].append(f"{shape}, {name}")
                continue
            found["sweeps" if name == "sweeps" else "steps"].extend(case())
            gc.collect()
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def report(found: dict[str, Any]) -> str:
    """Return the tables."""
    bits = "the same bits" if found["bits are those of the CPU"] else "OTHER BITS"
    intro = (
        f"{found['device']}, torch {found['torch']}, signs drawn by {found['drawn by']}. A run there and its replay on "
    )
    lines = [f"{intro}the CPU end at {bits}. A copy moves {found['bandwidth'] / 1e9:.0f} GB/s.", ""]
    sweeps = [(s["shape"], str(s["K"]), f"{1e3 * s['seconds']:.2f}", f"{s['over']:.2f}") for s in found["sweeps"]]
    lines += table(("OPT", "K", "ms a sweep", "over reading and writing once"), sweeps)
    steps = [
        (s["shape"], s["trained"], s["contender"], f"{1e3 * s['seconds']:.1f}", f"{s['over']:.2f}",
         "-" if s["memory"] is None else f"{s['memory']:.2f}")
        for s in found["steps"]
    ]  # fmt: skip
    titles = ("OPT", "trained", "contender", "ms a step", "over bare passes", "peak memory over inference")
    lines += ["", *table(titles, steps)]
    lines += [f"\nLeft out for want of time: {'; '.join(found['left out'])}."] if found["left out"] else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the tables, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few steps")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which no further case is begun")
    parser.add_argument("--output", type=Path, default=Path("device.json"))
    given = parser.parse_args()
    size = {"shapes": QUICK, "rows": 2, "tokens": 8, "directions": (1, 2), "steps": 2}
    if not given.quick:
        size = {"shapes": SHAPES, "rows": 4, "tokens": 64, "directions": (1, 16), "steps": 5}
    plan = Plan(device=torch.device(given.device), until=time.monotonic() + given.seconds, **size)
    found = measure(plan)
    given.output.write_text(json.dumps({**found, "plan": {**asdict(plan), "device": given.device}}, indent=1) + "\n")
    sys.stdout.write(report(found))
    if not found["bits are those of the CPU"]:
        sys.exit("The replay on the CPU ended at other bits.")


if __name__ == "__main__":
    main()
