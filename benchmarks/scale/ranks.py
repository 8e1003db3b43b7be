"""Processes on this machine, on its own network or on one of their own whose speed is limited.

    python benchmarks/scale/ranks.py '{"size": 2, "cases": [...]}'

starts them, as scale.py does, and writes what the first one measured, as JSON. Only Linux lets anybody make a network
of their own (`unshare -rn`), whose loopback `tc` limits.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hf_dpzo.distributed.processes import DistributedProcesses


Case = dict[str, Any]
FOUND = "found.json"
# Of which the least counts: what others do on the machine only adds to it.
TURNS = 3
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
    if "layers" in cases[0]:
        from training import trained  # It takes seconds to import, for each process.

        found = [trained(case, folder / str(number)) for number, case in enumerate(cases)]
    else:
        dist.init_process_group("gloo")
        found = [sent(case) for case in cases]
    if os.environ["RANK"] == "0":
        (folder / FOUND).write_text(json.dumps(found), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


def sent(case: Case) -> dict[str, float]:
    """Seconds of what one step sends, and bytes that it puts on the loopback, of all processes together."""
    group = DistributedProcesses(torch.device("cpu"))
    gradient = torch.ones(case.get("values", 0))
    sums = np.ones(case.get("directions", 0), dtype=np.int64)

    def once() -> None:
        if "values" in case:
            dist.all_reduce(gradient)
            return
        for collective in (group.reduce_sum, group.broadcast):
            if case["wait"]:  # Sleeping for no time would still let others take the core.
                time.sleep(case["wait"])
            collective(sums)

    once()
    dist.barrier()
    before, found = loopback_bytes(), []
    for _ in range(TURNS):
        began = time.perf_counter()
        for _ in range(case["times"]):
            once()
        dist.barrier()  # Small beside what is measured, and done only once all has arrived.
        found.append((time.perf_counter() - began) / case["times"])
    return {"seconds": min(found), "bytes": (loopback_bytes() - before) / case["times"] / TURNS}


def loopback_bytes() -> int:
    """All that this network's loopback has carried; that of the machine carries what others send, too."""
    lines = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


def main(told: str) -> None:
    """Start the processes, or be one of them."""
    if "RANK" in os.environ:
        work(told)
    elif start(told):
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1])
