"""Processes on this machine, on its own network or on one of their own whose speed is limited.

    python recipes/scale/ranks.py '{"size": 2, "cases": [...]}'

starts them, as measure.py does, and writes what the first one measured, as JSON. Only Linux lets anybody make a network
of their own (`unshare -rn`), whose loopback `tc` limits.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, default_data_collator

from hf_dpzo import ZOTrainer, ZOTrainingArguments
from hf_dpzo.processes import Group


Case = dict[str, Any]
FOUND = "found.json"
# So few that embeddings are a small part of a model.
WORDS = 1000
# A limit of which a burst of 256 KiB is exempt, and which keeps packets back instead of losing them.
_LIMIT = "ip link set lo up && tc qdisc add dev lo root tbf rate {rate}mbit burst 256kb latency 400ms"
_NO_LIMIT = "ip link set lo up"


def own_network(rate: int | None) -> list[str]:
    """What to put before a command to run it on a loopback of its own, of so many Mbit/s."""
    prepared = _NO_LIMIT if rate is None else _LIMIT.format(rate=rate)
    return ["unshare", "-rn", "sh", "-c", f'{prepared} && exec "$@"', "sh"]


def limits_work() -> bool:
    """Whether this machine can limit a network."""
    try:
        return subprocess.run([*own_network(100), "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def measured(size: int, cases: list[Case], before: list[str] | None = None) -> list[dict[str, float]]:
    """Start processes, after `before`, and return what they found for each case."""
    with tempfile.TemporaryDirectory() as folder:
        told = json.dumps({"size": size, "cases": cases, "folder": folder})
        command = [*(before or []), sys.executable, "-W", "ignore", __file__, told]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise SystemExit(f"{size} processes: they failed, and the last that they said is: {last}")
        return json.loads((Path(folder) / FOUND).read_text(encoding="utf-8"))


def start(told: str) -> int:
    """Start one process for each rank; the number of those that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = json.loads(told)["size"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    command = [sys.executable, "-W", "ignore", __file__, told]
    running = [subprocess.Popen(command, env=environment) for environment in ranks]
    return sum(one.wait() != 0 for one in running)


def work(told: str) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    cases, folder = json.loads(told)["cases"], Path(json.loads(told)["folder"])
    if "layers" not in cases[0]:
        dist.init_process_group("gloo")
    found = [trained(case, folder / str(i)) if "layers" in case else sent(case) for i, case in enumerate(cases)]
    if os.environ["RANK"] == "0":
        (folder / FOUND).write_text(json.dumps(found), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


def sent(case: Case) -> dict[str, float]:
    """Seconds of what one step sends, and bytes that it puts on the loopback, of all processes together."""
    group = Group(torch.device("cpu"))
    gradient = torch.ones(case.get("values", 0))
    sums = np.ones(case.get("directions", 0), dtype=np.int64)

    def once() -> None:
        if "values" in case:
            dist.all_reduce(gradient)
            return
        time.sleep(case["wait"])
        group.sum(sums)
        time.sleep(case["wait"])
        group.told(sums)

    once()
    dist.barrier()
    before, began = loopback_bytes(), time.perf_counter()
    for _ in range(case["times"]):
        once()
    dist.barrier()  # Small beside what is measured, and done only once all has arrived.
    took = time.perf_counter() - began
    return {"seconds": took / case["times"], "bytes": (loopback_bytes() - before) / case["times"]}


def loopback_bytes() -> int:
    """All that this network's loopback has carried; that of the machine carries what others send, too."""
    lines = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


class Laps(TrainerCallback):
    """The seconds from the end of one step to that of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a step, the median."""
        return statistics.median(after - before for before, after in zip(self.ends, self.ends[1:], strict=False))


def encoder(layers: int, hidden: int) -> BertConfig:
    """An encoder whose embeddings are few."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(num_hidden_layers=layers, vocab_size=WORDS, **sizes, **drops)


def trained(case: Case, folder: Path) -> dict[str, float]:
    """Seconds of a whole step of a run that trains all parameters, each step on all rows."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(encoder(case["layers"], case["hidden"]))
    ids = torch.randint(5, WORDS, (case["rows"], case["tokens"])).tolist()
    rows = [{"input_ids": one, "attention_mask": [1] * len(one), "labels": i % 2} for i, one in enumerate(ids)]
    laps = Laps()
    args = ZOTrainingArguments(
        output_dir=str(folder),
        method="aggzo",
        num_directions=case["directions"],
        noise_multiplier=1.0,
        target_delta=1e-3,
        expected_batch_size=case["rows"],
        per_device_train_batch_size=case["rows"],
        max_steps=case["times"] + 1,
        learning_rate=1e-6,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_list(rows)
    ZOTrainer(model=model, args=args, train_dataset=data, data_collator=default_data_collator, callbacks=[laps]).train()
    return {"seconds": laps.seconds, "trained": sum(parameter.numel() for parameter in model.parameters())}


def main(told: str) -> None:
    """Start the processes, or be one of them."""
    if "RANK" in os.environ:
        work(told)
    elif start(told):
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1])
