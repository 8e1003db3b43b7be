"""What a step costs on many devices: a small model, in plain arithmetic.

Terms are added up, as if nothing happened at the same time as something else. Units are seconds, bytes and bytes a
second everywhere.
"""

import math
from dataclasses import dataclass


# What is trained is float32, and so is its gradient; what is released, or summed over processes, is int64.
TRAINED_BYTES, RELEASED_BYTES = 4, 8


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hosts that are all alike, with devices that are all alike.

    Args:
        devices: of all hosts together.
        devices_per_host: of one.
        flops: operations a second that a device reaches; a multiplication and its addition are two.
        pass_seconds: what a forward pass takes beside its operations.
        memory: bytes of a device that weights may take.
        memory_bandwidth: bytes a second that a device reads and writes, together.
        host_bandwidth: bytes a second that a device receives from the others of its host.
        sign_seconds: what one process needs to draw one coordinate of a direction.
    """

    devices: int
    devices_per_host: int
    flops: float
    pass_seconds: float = 0.0
    memory: float
    memory_bandwidth: float
    host_bandwidth: float
    sign_seconds: float = 0.0

    @property
    def hosts(self) -> int:
        """How many there are."""
        return math.ceil(self.devices / self.devices_per_host)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is between the hosts.

    Args:
        latency: seconds of a collective over all processes that moves next to nothing.
        bandwidth: bytes a second into each host, and as many out of it, at once.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run.

    Args:
        parameters: of the model.
        trained: how many of them, or of an adapter, are trained.
        weight_bytes: of a parameter, where it is read.
        tokens: of a row.
        rows: of a step, on average over its Poisson batches.
        directions: K.
        difference: `central` (2K probe points) or `forward` (K + 1).
        micro_batch: rows that a device evaluates at once.
        fixed_shapes: whether all micro-batches have that many rows, one of them a copy, as with `padded_lengths`.
        copy_devices: over how many devices one copy of the model is split.
        split: `layers`, of which each device has some and one device works at a time, as with `device_map`; or
            `shards`, of which each device gathers the others' before it uses them, as with `fully_shard`.
    """

    parameters: float
    trained: float
    weight_bytes: float
    tokens: int
    rows: int
    directions: int
    difference: str = "central"
    micro_batch: int = 1
    fixed_shapes: bool = False
    copy_devices: int = 1
    split: str = "shards"

    @property
    def points(self) -> int:
        """How often a step evaluates its batch."""
        return 2 * self.directions if self.difference == "central" else self.directions + 1

    @property
    def sweeps(self) -> int:
        """How often a step reads and writes all that is trained; forward differences begin where it is."""
        return 2 * self.directions + 1 if self.difference == "central" else self.directions + 1

    @property
    def draws(self) -> int:
        """How often a step draws a direction: for the walk, and for the update but the one that the walk ended with."""
        return 2 * self.directions - 1


def refuse_unfit(run: Run, machine: Machine) -> None:
    """Raise `ValueError` where devices do not hold their part of the weights, or do not make up whole copies."""
    needed = run.parameters * run.weight_bytes / run.copy_devices
    if needed > machine.memory:
        raise ValueError(
            f"copy_devices={run.copy_devices}: each would hold {needed / 1e9:.3g} GB of weights, and has "
            f"{machine.memory / 1e9:.3g} GB for them; split a copy over more devices."
        )
    if machine.devices % run.copy_devices:
        raise ValueError(f"copy_devices={run.copy_devices}: {machine.devices} devices make up no whole copies.")


def workers(run: Run, machine: Machine) -> int:
    """How many processes evaluate rows at the same time: all devices, or one for each copy that is split by layers."""
    return machine.devices // run.copy_devices if run.split == "layers" else machine.devices


def busiest(run: Run, machine: Machine, room: int) -> float:
    """How many micro-batches with room for so many rows the busiest worker is expected to have; the others wait for it.

    Workers draw their rows by themselves, so that each has a Poisson number of them.
    """
    count = workers(run, machine)
    mean = run.rows / count
    expected, below, taken = 0.0, 0.0, 0
    for number in range(math.ceil(mean + 12 * math.sqrt(mean) + 40)):
        below += math.exp(number * math.log(mean) - mean - math.lgamma(number + 1))
        # The expectation is the sum over n of the probability that some worker has more than n micro-batches.
        if number == taken * room:
            expected, taken = expected + 1 - min(below, 1.0) ** count, taken + 1
    return expected


def micro_batches(run: Run, machine: Machine) -> float:
    """How many of them that worker evaluates at each point: in fixed shapes one place of each is a copy."""
    return busiest(run, machine, max(1, run.micro_batch - run.fixed_shapes))


def filled(run: Run, machine: Machine) -> float:
    """What they cost in whole ones: in fixed shapes empty places cost as much as others, elsewhere nothing."""
    return micro_batches(run, machine) if run.fixed_shapes else busiest(run, machine, 1) / run.micro_batch


def pass_seconds(run: Run, machine: Machine) -> float:
    """One forward pass of one micro-batch: two operations for each parameter and token, or reading the weights once."""
    operations = 2 * run.parameters * run.tokens * run.micro_batch
    reading = run.parameters * run.weight_bytes / machine.memory_bandwidth
    return machine.pass_seconds + max(operations / machine.flops, reading)


def forward_seconds(run: Run, machine: Machine) -> float:
    """All forward passes of a step."""
    return run.points * filled(run, machine) * pass_seconds(run, machine)


def even_seconds(run: Run, machine: Machine) -> float:
    """The same, had each worker as many rows as any other, and were all places of micro-batches filled."""
    return run.points * run.rows / workers(run, machine) * pass_seconds(run, machine) / run.micro_batch


def gathered_seconds(run: Run, machine: Machine, network: Network) -> float:
    """The weights that shards send each other in one forward pass, within a host or between hosts."""
    if run.split == "layers" or run.copy_devices == 1:
        return 0.0
    weights = run.parameters * run.weight_bytes
    within = weights * (1 - 1 / run.copy_devices) / machine.host_bandwidth
    hosts = math.ceil(run.copy_devices / machine.devices_per_host)
    return max(within, weights * (1 - 1 / hosts) / network.bandwidth)


def gathering_seconds(run: Run, machine: Machine, network: Network) -> float:
    """The same, of a step: each micro-batch at each point gathers all weights."""
    return run.points * micro_batches(run, machine) * gathered_seconds(run, machine, network)


def swept(run: Run) -> float:
    """How many coordinates a process moves: its part. Where layers are split, one process moves all of them."""
    return run.trained if run.split == "layers" else run.trained / run.copy_devices


def sweep_seconds(run: Run, machine: Machine) -> float:
    """Reading and writing what is trained."""
    return run.sweeps * swept(run) * 2 * TRAINED_BYTES / machine.memory_bandwidth


def sign_seconds(run: Run, machine: Machine) -> float:
    """Drawing the directions."""
    return run.draws * swept(run) * machine.sign_seconds


def collective_bytes(run: Run) -> int:
    """What a process sends, and what it receives, in a step: one number for each direction."""
    return RELEASED_BYTES * run.directions


def collective_seconds(run: Run, machine: Machine, network: Network) -> float:
    """The two collectives of a step: sums to the first process, and what is released from it."""
    if machine.devices == 1:
        return 0.0
    return 2 * (network.latency + collective_bytes(run) / network.bandwidth)


def ring_bytes(size: float, members: int) -> float:
    """What each member of a ring sends, and receives, to have `size` bytes added up and know the sum.

    >>> ring_bytes(100, 2), ring_bytes(100, 1)
    (100.0, 0.0)
    """
    return 2 * size * (1 - 1 / members)


def gradient_seconds(run: Run, machine: Machine, network: Network) -> float:
    """The gradients that data-parallel DP-SGD adds up between hosts in a step."""
    if machine.hosts == 1:
        return 0.0
    return network.latency + ring_bytes(TRAINED_BYTES * run.trained, machine.hosts) / network.bandwidth


def backward_seconds(run: Run, machine: Machine) -> float:
    """The passes of a step of DP-SGD: one forward, and one back, whose gradients of weights are of what is trained.

    Clipping each row costs more, which is left out, in favour of DP-SGD.
    """
    passes = 2 + min(1.0, run.trained / run.parameters)
    return passes * filled(run, machine) * pass_seconds(run, machine)


def step_seconds(run: Run, machine: Machine, network: Network) -> float:
    """A step: the sum of its terms."""
    return (
        forward_seconds(run, machine)
        + gathering_seconds(run, machine, network)
        + sweep_seconds(run, machine)
        + sign_seconds(run, machine)
        + collective_seconds(run, machine, network)
    )
