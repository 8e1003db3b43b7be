"""Fits the constants of cost.py on this machine, and checks what it predicts where nothing was fitted.

    python benchmarks/scale/scale.py

One thread for each process; some five minutes. Each line says whether its case was fitted or predicted. What computes
is measured in CPU time, and what is sent by the clock.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import cost
import numpy as np
import ranks
import tables
import torch
import training
from transformers import BertModel

from hf_dpzo.zo.directions import Rademacher
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.philox import CHUNK_SIZE, Stream
from hf_dpzo.zo.spsa import CentralDifference
from hf_dpzo.zo.walk import AddingWalk, CopyingWalk


# Layers, width, rows, tokens; the first three are fitted.
FORWARD = ((4, 256, 4, 32), (4, 512, 16, 64), (8, 768, 8, 128))
FORWARD += ((2, 256, 8, 64), (8, 256, 16, 64), (8, 512, 4, 64), (12, 768, 4, 64), (12, 768, 16, 64), (6, 1024, 8, 64))
# Trained, directions; the first two are fitted.
ADAPTERS = ((1_000_000, 1), (1_000_000, 16), (300_000, 4), (3_000_000, 1), (3_000_000, 8))
ALL = ((64_000_000, 1), (64_000_000, 8), (32_000_000, 2), (64_000_000, 4), (128_000_000, 1))
# Directions, and seconds that each collective waits for; the first is fitted, for each number of processes.
COLLECTIVES = ((64, 0.0), (1, 0.0), (1024, 0.0), (1, 0.001), (64, 0.01), (64, 0.1))
# Values of a gradient; and limits of the network, in Mbit/s.
GRADIENTS, LIMITS = (1_000, 300_000, 1_000_000, 3_000_000, 10_000_000), (1000, 100)
# Layers, width, rows, tokens, directions, processes.
WHOLE = ((8, 512, 8, 32, 1, 1), (8, 512, 8, 32, 1, 2), (8, 512, 8, 32, 4, 2))
THIS = cost.Machine(
    devices=1, devices_per_host=1, flops=1.0, memory=np.inf, memory_bandwidth=np.inf, host_bandwidth=np.inf
)
RUN = cost.Run(parameters=0.0, trained=0.0, weight_bytes=4, tokens=1, rows=1, directions=1)


def least(works: Sequence[Callable[[], object]], turns: int) -> list[float]:
    """CPU seconds of each: they take turns, and the least counts, for what others do on the machine only adds to it."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(turns + 1):
        for work, times in zip(works, found, strict=True):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
    return [min(times[1:]) for times in found]


def fitted(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Constants, not negative, that bring sums of terms closest to seconds, by their ratio."""
    scaled = np.array(terms) / np.array(seconds)[:, None]
    found = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)[0]
    if (found >= 0).all():
        return found.tolist()
    kept = found > 0
    rest = iter(fitted(np.array(terms)[:, kept].tolist(), seconds))
    return [next(rest) if one else 0.0 for one in kept]


def say(*cells: object) -> None:
    """Print a row of a table at once."""
    sys.stdout.write(tables.row(*cells))
    sys.stdout.flush()


def head(*cells: str) -> None:
    """Begin a table."""
    sys.stdout.write("\n")
    say(*cells)
    say(*["---"] * len(cells))


def compare(case: Sequence[object], predicted: float, found: float, is_fitted: bool) -> None:
    """Print a case: prediction, measurement, and their ratio."""
    kind = "fitted" if is_fitted else "predicted"
    say(*case, kind, tables.words(predicted), tables.words(found), f"{predicted / found:.2f}")


COMPARED = ("", "model", "measured", "ratio")


@torch.no_grad()
def forward() -> cost.Machine:
    """Forward passes."""
    runs, works = [], []
    for layers, hidden, rows, tokens in FORWARD:
        model = BertModel(training.encoder(layers, hidden), add_pooling_layer=False).eval()
        parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
        ids = torch.randint(5, training.WORDS, (rows, tokens))
        runs.append(replace(RUN, parameters=parameters, tokens=tokens, micro_batch=rows))
        works.append(functools.partial(model, ids))
    found = least(works, 6)
    terms = [(1.0, cost.pass_seconds(run, THIS)) for run in runs]
    once, each = fitted(terms[:3], found[:3])
    machine = replace(THIS, flops=1 / each, pass_seconds=once)
    head("layers x width, rows x tokens", "parameters, M", *COMPARED)
    for number, (case, run) in enumerate(zip(FORWARD, runs, strict=True)):
        shape = "{} x {}, {} x {}".format(*case)
        millions = f"{run.parameters / 1e6:.1f}"
        compare((shape, millions), cost.pass_seconds(run, machine), found[number], number < 3)
    say("constants", f"{machine.flops / 1e9:.1f} GFLOP/s", "and for each pass", tables.words(once), "", "")
    return machine


def stepped(trained: int, directions: int, kind: type) -> Callable[[], None]:
    """A step without a model: the walk and the update of so many parameters."""
    parameter = torch.nn.Parameter(torch.zeros(trained))
    optimizer = ZOOptimizer([parameter], directions=Rademacher, seed=0, lr=1e-6)
    optimizer.begin_stage()
    difference = CentralDifference(smoothing=1e-3, num_directions=directions)
    numbers = iter(range(1 << 30))

    def step() -> None:
        number = next(numbers)
        walk = kind(optimizer.parameters(), optimizer.directions, step=number, points=difference.points)
        with optimizer.follow(walk, step=number):
            for _ in walk:
                pass
        optimizer.receive(step=number, coefficients=[1.0] * directions)
        optimizer.step()

    return step


def sweeps(cases: Sequence[tuple[int, int]], kind: type, machine: cost.Machine) -> cost.Machine:
    """Perturbation and update."""
    runs = [replace(RUN, trained=trained, directions=directions) for trained, directions in cases]
    found = least([stepped(*case, kind) for case in cases], 10)
    unit = replace(machine, memory_bandwidth=1.0, sign_seconds=1.0)
    terms = [(cost.sweep_seconds(run, unit), cost.sign_seconds(run, unit)) for run in runs]
    byte, sign = fitted(terms[:2], found[:2])
    machine = replace(machine, memory_bandwidth=1 / byte if byte else np.inf, sign_seconds=sign)
    head("trained", "K", "ns a coordinate", *COMPARED)
    for number, (run, took) in enumerate(zip(runs, found, strict=True)):
        predicted = cost.sweep_seconds(run, machine) + cost.sign_seconds(run, machine)
        compare((f"{run.trained:,}", run.directions, f"{took / run.trained * 1e9:.2f}"), predicted, took, number < 2)
    each = 2 * cost.TRAINED_BYTES * byte * 1e9
    say("constants", "", f"{each:.2f} a sweep", f"{sign * 1e9:.3f} ns a sign", "", "", "")
    return machine


def floors() -> None:
    """What reading and writing takes by itself, and drawing by itself."""
    values, stream, chunks = torch.zeros(64_000_000), Stream(0), range(200)
    works = (lambda: values.add_(1.0), lambda: [stream.seek((i, 0, 0, 0)).random_raw(CHUNK_SIZE // 64) for i in chunks])
    touching, drawing = least(works, 10)
    head("by itself", "ns a coordinate")
    say("reading and writing float32", f"{touching / len(values) * 1e9:.2f}")
    say("drawing a sign", f"{drawing / len(chunks) / CHUNK_SIZE * 1e9:.3f}")


def collectives(before: list[str] | None) -> float:
    """What one step of ours sends, without any limit; return the latency between two processes."""
    head("processes", "K", "each waits", "bytes on the network", *COMPARED)
    latencies = {}
    for size in (2, 4):
        asked = [{"directions": k, "wait": wait, "times": 10 if wait else 200} for k, wait in COLLECTIVES]
        found = ranks.measured(size, asked, before)
        latencies[size] = found[0]["seconds"] / 2
        for number, ((k, wait), one) in enumerate(zip(COLLECTIVES, found, strict=True)):
            network = cost.Network(latency=latencies[size] + wait, bandwidth=np.inf)
            predicted = cost.collective_seconds(replace(RUN, directions=k), replace(THIS, devices=size), network)
            carried = f"{one['bytes']:,.0f}" if before else "not counted"
            compare((size, k, tables.words(wait), carried), predicted, one["seconds"], number == 0)
    return latencies[2]


def beside(latency: float, limit: int | None, before: list[str] | None) -> None:
    """One step of ours, and gradients, of two processes on one network."""
    two = replace(THIS, devices=2)
    asked = [{"directions": k, "wait": 0.0, "times": 100} for k in (1, 64)]
    asked += [{"values": values, "times": max(1, 1_000_000 // values)} for values in GRADIENTS]
    found = ranks.measured(2, asked, before)
    # Both processes send through one loopback. Without a limit, what gloo reaches is fitted to the largest gradient.
    bandwidth = 4 * GRADIENTS[-1] / found[-1]["seconds"] if limit is None else limit * 1e6 / 8 / 2
    network = cost.Network(latency=latency, bandwidth=bandwidth)
    speed = "none" if limit is None else f"{limit} Mbit/s"
    for number, (case, one) in enumerate(zip(asked, found, strict=True)):
        run = replace(RUN, directions=case.get("directions", 1), trained=case.get("values", 0))
        sent = cost.gradient_seconds if "values" in case else cost.collective_seconds
        what = f"gradient of {run.trained:,}" if "values" in case else f"ours, K = {run.directions}"
        carried = f"{one['bytes']:,.0f}" if before else "not counted"
        is_fitted = limit is None and number == len(asked) - 1
        compare((speed, what, carried), sent(run, two, network), one["seconds"], is_fitted)


def whole(machine: cost.Machine) -> None:
    """CPU time of steps of whole runs, from what was fitted to their parts; collectives wait, and take none."""
    head("layers x width, rows x tokens", "K", "processes", *COMPARED)
    for layers, hidden, rows, tokens, k, size in WHOLE:
        asked = {"layers": layers, "hidden": hidden, "rows": rows, "tokens": tokens, "directions": k, "times": 5}
        (one,) = ranks.measured(size, [asked])
        run = replace(RUN, trained=one["trained"], parameters=12 * layers * hidden**2, tokens=tokens, directions=k)
        run = replace(run, micro_batch=rows // size)
        predicted = run.points * cost.pass_seconds(run, machine)
        predicted += cost.sweep_seconds(run, machine) + cost.sign_seconds(run, machine)
        compare((f"{layers} x {hidden}, {rows} x {tokens}", k, size), predicted, one["seconds"], False)


def main() -> None:
    """Print all tables."""
    torch.set_num_threads(1)
    limited = ranks.limits_work()
    before = ranks.own_network(None) if limited else None
    machine = forward()
    floors()
    sweeps(ADAPTERS, CopyingWalk, machine)
    machine = sweeps(ALL, AddingWalk, machine)
    latency = collectives(before)
    head("limit", "what is sent", "bytes on the network", *COMPARED)
    for limit in (None, *(LIMITS if limited else ())):
        beside(latency, limit, ranks.own_network(limit) if limited else None)
    if not limited:
        sys.stdout.write("\nLimited networks were left out: `unshare -rn` with `ip` and `tc` does not work here.\n")
    whole(machine)


if __name__ == "__main__":
    main()
