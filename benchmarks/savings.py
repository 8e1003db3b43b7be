"""What is saved by not computing what no loss needs: the output layer where there are no targets.

    python benchmarks/savings.py

Times are ratios, measured side by side in turns, so that another load on the machine meets both alike. Models are of
random weights, in the shapes of known ones.
"""

import ctypes
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from shared import table
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.prompting import MaskedWordLoss, NextWordLoss


TURNS, TOKENS, TARGETS, MASK, WORDS = 3, 64, 8, 103, [2204, 2919]

Work = Callable[[], object]


@torch.no_grad()
def ratio(new: Work, old: Work) -> float:
    """The median over the turns of the time of `new` over that of `old`, after one unmeasured turn."""
    found = []
    for _ in range(TURNS + 1):
        times = []
        for work in (new, old):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        found.append(times[0] / times[1])
    return statistics.median(found[1:])


def kibibytes(name: str) -> int:
    """What Linux says of this process's memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory(work: Work) -> float:
    """By how many MiB the peak of a process grows that does it once."""
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # Memory that is free already would hide what is needed.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Forgets the peak so far, on Linux.
        before = kibibytes("VmRSS")
        with torch.no_grad():
            work()
        sending.send((kibibytes("VmHWM") - before) / 1024)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return receiving.recv()


def batch(rows: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Made-up rows, with a mask near their end."""
    ids = torch.randint(1000, vocabulary, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, -3] = MASK
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def compared(what: str, shape: str, new: Work, old: Work) -> list[str]:
    """One row of the table."""
    new(), old()  # What is only done once is done before.
    return [what, shape, f"{ratio(new, old):.2f}", f"{memory(new) / memory(old):.2f}"]


def prompts() -> list[list[str]]:
    """Label words at one position, beside all logits."""
    decoder = OPTForCausalLM(OPTConfig()).eval()
    encoder = BertForMaskedLM(BertConfig()).eval()
    losses = {
        "decoder": (decoder, NextWordLoss(words=WORDS, model=decoder)),
        "encoder": (encoder, MaskedWordLoss(words=WORDS, mask_token_id=MASK, model=encoder)),
    }
    found = []
    for name, (model, loss) in losses.items():
        for rows in (4, 16):
            inputs = batch(rows, model.config.vocab_size)
            what = f"label words at one position, {name}"
            new, old = lambda: loss.scores(model, inputs), lambda: model(**inputs).logits.float()  # noqa: B023
            found.append(compared(what, f"{rows} x {TOKENS}", new, old))
        if name == "decoder":
            last = lambda: model(**inputs, logits_to_keep=1).logits.float()  # noqa: B023, E731
            found.append(compared(f"{what}, beside all words there", f"{rows} x {TOKENS}", new, last))
    return found


def targets() -> list[list[str]]:
    """A language model's loss at its targets, beside that of all logits."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes)).eval()
    loss, inputs = CausalLMLoss(model), batch(16, 32000)
    found = []
    for what, first in ((f"the last {TARGETS} tokens are targets", TOKENS - TARGETS), ("all tokens are targets", 0)):
        labels = inputs["input_ids"].masked_fill(torch.arange(TOKENS) < first, -100)
        given = {**inputs, "labels": labels}
        new, old = lambda: loss(model, given), lambda: loss.evaluate(model, given)  # noqa: B023
        found.append(compared(what, f"16 x {TOKENS}", new, old))
        plain = lambda: model(**inputs).logits  # noqa: E731
        found.append(compared(f"{what}, beside inference without any loss", f"16 x {TOKENS}", new, plain))
    return found


def main() -> None:
    """Measure, and print a table."""
    torch.set_num_threads(1)
    titles, rows = ("what", "rows x tokens", "time", "growth of peak memory"), [*prompts(), *targets()]
    sys.stdout.write("\n".join(table(titles, rows)) + "\n")


if __name__ == "__main__":
    main()
