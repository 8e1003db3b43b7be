"""Frozen bases in few bits beside float32: their losses and coefficients, and the time of passes and steps."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from shared import LoraRun, table
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_torchao_available
from walking import Walker, Way

from hf_dpzo.losses.prompting import NextWordLoss
from hf_dpzo.models.float32_residual import keep_residual_in_float32
from hf_dpzo.models.precision import build_loading_options, inner_tensors
from hf_dpzo.recipe.loading import add_adapter, load_model


COMPARED, DIRECTIONS, SMOOTHINGS, WIDTH = 16, 3, (1e-2, 5e-2), 64
REPEATS, TOKENS, RANK = 5, 40, 8
# SmolLM2-135M's.
SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Base:
    """How a base is loaded, and computes.

    Args:
        dtype: of the weights that are not quantized.
        quantization: of linear layers; `None` for none.
        stock: whether it computes as transformers and torchao do, and not with a float32 residual stream.
    """

    dtype: str = "float32"
    quantization: str | None = None
    stock: bool = False

    @property
    def title(self) -> str:
        """The name of the base in a table."""
        weights = self.dtype if self.quantization is None else f"{self.quantization}, else {self.dtype}"
        return f"{weights}, as loaded" if self.stock else weights

    def load(self, folder: str) -> LlamaForCausalLM:
        """Return the base that is saved in `folder`."""
        options = build_loading_options(self.dtype, self.quantization)
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the base with its adapter, in the way in which it is to compute."""
        if not self.stock:
            keep_residual_in_float32(model)
        return model


BASES = [Base(), *(Base(dtype="bfloat16", stock=stock) for stock in (False, True))]
INT8_BASES = [
    Base(dtype=dtype, quantization="int8", stock=stock) for dtype in ("float32", "bfloat16") for stock in (False, True)
]


def list_bases() -> list[Base]:
    """Return float32 first, then the bases in few bits that can be made here."""
    return [*BASES, *(INT8_BASES if is_torchao_available() else [])]


# ---- What is computed ----


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Losses of rows, and for each smoothing their coefficients; the bytes of all weights."""

    losses: torch.Tensor
    coefficients: list[torch.Tensor]
    size: int = 0


def compare_coefficients() -> list[str]:
    """The table of losses and coefficients on bases in few bits."""
    start = LoraRun.load("--max_length", str(WIDTH))
    collate = DataCollatorWithPadding(start.tokenizer, padding="max_length", max_length=WIDTH)
    inputs = collate([start.train[i] for i in range(COMPARED)])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        bare = replace(start.recipe, adapter="none")
        load_model(bare, start.tokenizer, seed=start.args.seed).save_pretrained(folder)
        for base in list_bases():
            model = add_adapter(base.load(folder), start.recipe, seed=start.args.seed)
            found[base] = _measure(start, base.prepare(model), inputs)
    plain = found[Base()]
    titles = ["base", "weights", "losses differ by"]
    titles += [f"coefficients, smoothing {smoothing:g}" for smoothing in SMOOTHINGS]
    rows = []
    for base, one in found.items():
        cells = [base.title, f"{one.size / plain.size:.2f}", f"{(one.losses - plain.losses).abs().mean():.2g}"]
        for here, there in zip(one.coefficients, plain.coefficients, strict=True):
            same = (here.sign() == there.sign()).double().mean()
            apart = f"± {(here - there).std():.2g}, {same:.0%} same sign"
            cells.append(f"{there.std():.3g}" if one is plain else apart)
        rows.append(cells)
    return [*table(titles, rows), "", f"float32: {plain.size / 1e6:.0f} MB; {COMPARED} rows of {WIDTH} tokens."]


def _measure(start: LoraRun, model: torch.nn.Module, inputs: dict) -> Measured:
    loss = start.loss(model)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    walker = Walker(adapter, Way(dtype=torch.float32), start.args.seed)
    # A new adapter is a saddle, since half of its matrices are zero: look at one that has moved.
    walker.add(10**6, 1e-2)
    losses, coefficients = loss(model, inputs), []
    for smoothing in SMOOTHINGS:
        of_rows = [walker.differences(step, partial(loss, model, inputs), smoothing) for step in range(DIRECTIONS)]
        coefficients.append(torch.stack(of_rows, dim=1))
    size = sum(t.numel() * t.element_size() for p in model.parameters() for t in inner_tensors(p.data))
    return Measured(losses=losses, coefficients=coefficients, size=size)


# ---- How long it takes ----


def time_passes() -> list[str]:
    """The table of the time of passes and steps, relative to float32, on random weights."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
        models = {base: _load_adapted(base, folder) for base in list_bases()}
    ids = torch.randint(SIZES["vocab_size"], (COMPARED, TOKENS), generator=torch.Generator().manual_seed(0))
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ways = {
        "label words": (_score_words, full),
        "all logits": (_compute_logits, full),
        "a step": (_step, full),
    }
    columns, seconds = {}, {}
    for title, (prepare, inputs) in ways.items():
        runs = {base: prepare(model, inputs) for base, model in models.items()}
        times = _alternate(runs)
        seconds[title] = float(np.median(times[Base()]))
        columns[title] = {base: float(np.median(np.divide(own, times[Base()]))) for base, own in times.items()}
    rows = [[base.title, *(f"{columns[title][base]:.2f}" for title in ways)] for base in models]
    stated = ", ".join(f"{title} {value:.2f} s" for title, value in seconds.items())
    note = f"float32: {stated}; {COMPARED} rows of {TOKENS} tokens, one thread, median of {REPEATS} alternating rounds."
    return [*table(["base", *ways], rows), "", note]


def _load_adapted(base: Base, folder: str | Path) -> torch.nn.Module:
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=["q_proj", "v_proj"])
    return base.prepare(get_peft_model(base.load(folder), config)).eval()


def _alternate(runs: Mapping[Base, Callable[[], object]]) -> dict[Base, list[float]]:
    """Return the processor's seconds of each run, so that others beside it do not count, round by round."""
    times: dict[Base, list[float]] = {base: [] for base in runs}
    for round_number in range(REPEATS + 1):
        for base, run in runs.items():
            started = time.process_time()
            run()
            if round_number:  # The first is for warming up.
                times[base].append(time.process_time() - started)
    return times


def _score_words(model: torch.nn.Module, inputs: dict) -> Callable[[], torch.Tensor]:
    loss = NextWordLoss(words=[5, 6], model=model)
    return partial(loss, model, {**inputs, "labels": torch.zeros(COMPARED, dtype=torch.long)})


def _compute_logits(model: torch.nn.Module, inputs: dict) -> Callable[[], torch.Tensor]:
    return lambda: model(**inputs, use_cache=False).logits


def _step(model: torch.nn.Module, inputs: dict) -> Callable[[], torch.Tensor]:
    """A central difference with one direction, there and back, and an update of the adapter."""
    walker = Walker([p for p in model.parameters() if p.requires_grad], Way(dtype=torch.float32), 0)
    losses = _score_words(model, inputs)

    def step() -> None:
        found = walker.differences(0, losses, SMOOTHINGS[0])
        walker.update(0, -1e-6 * found.mean().item())

    return step
