"""The cost model agrees with its terms and with the code, and its table is the one on the page."""

import doctest
import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from hf_dpzo.distributed.processes import SingleProcess
from hf_dpzo.privacy.mechanism import GaussianSum
from hf_dpzo.zo.directions import Rademacher
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.philox import Stream
from hf_dpzo.zo.spsa import DIFFERENCES, CentralDifference
from hf_dpzo.zo.walk import AddingWalk

from support.paths import MEASUREMENTS, ROOT


FOLDER = MEASUREMENTS / "scale"


@pytest.fixture(scope="module")
def scale():
    """The recipe's modules."""
    names = ("cost", "ranks", "scale", "tables", "training")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER))
    for name in names:
        del sys.modules[name]
        if before[name] is not None:
            sys.modules[name] = before[name]


@pytest.fixture
def cost(scale):
    return scale.cost


@pytest.fixture
def machine(cost):
    """Two hosts of two devices."""
    speeds = {"flops": 1e9, "memory": 1e7, "memory_bandwidth": 1e9, "host_bandwidth": 1e8, "sign_seconds": 1e-9}
    return cost.Machine(devices=4, devices_per_host=2, **speeds)


@pytest.fixture
def run(cost):
    sizes = {"parameters": 1e6, "trained": 1e5, "weight_bytes": 4, "tokens": 10, "rows": 8}
    return cost.Run(**sizes, directions=2, micro_batch=2)


@pytest.fixture
def network(cost):
    return cost.Network(latency=1e-3, bandwidth=1e6)


# ---- Terms computed by hand ----


def test_the_terms_of_a_step_are_those_computed_by_hand(cost, machine, run, network):
    assert cost.pass_seconds(run, machine) == pytest.approx(2 * 1e6 * 10 * 2 / 1e9)
    busiest = cost.filled(run, machine)
    assert cost.forward_seconds(run, machine) == pytest.approx(4 * busiest * 0.04)
    assert cost.sweep_seconds(run, machine) == pytest.approx(5 * 1e5 * 8 / 1e9)
    assert cost.sign_seconds(run, machine) == pytest.approx(3 * 1e5 * 1e-9)
    assert cost.collective_seconds(run, machine, network) == pytest.approx(2 * (1e-3 + 2 * 8 / 1e6))
    assert cost.gradient_seconds(run, machine, network) == pytest.approx(1e-3 + 4e5 / 1e6)
    assert cost.even_seconds(run, machine) == pytest.approx(4 * 2 * 0.02)
    assert cost.backward_seconds(run, machine) == pytest.approx(2.1 * busiest * 0.04)
    terms = 4 * busiest * 0.04 + 4e-3 + 3e-4 + 2.032e-3
    assert cost.step_seconds(run, machine, network) == pytest.approx(terms)


def test_few_tokens_take_the_time_of_reading_the_weights(cost, machine, run):
    few = replace(run, tokens=1, micro_batch=1)
    assert cost.pass_seconds(few, machine) == pytest.approx(4e6 / 1e9)


def test_forward_differences_take_one_more_pass_and_sweep_than_directions(run):
    forward = replace(run, difference="forward")
    assert (forward.points, forward.sweeps, forward.draws) == (3, 3, 3)


@pytest.mark.parametrize(("devices", "seconds"), [(1, 0.0), (2, 4e6 / 2 / 1e8), (4, 4e6 / 2 / 1e6)])
def test_shards_send_weights_within_a_host_or_between_hosts(cost, machine, run, network, devices, seconds):
    assert cost.gathered_seconds(replace(run, copy_devices=devices), machine, network) == pytest.approx(seconds)


def test_layers_send_no_weights_and_leave_devices_idle(cost, machine, run, network):
    layers = replace(run, copy_devices=2, split="layers")
    assert cost.gathered_seconds(layers, machine, network) == 0
    assert cost.workers(layers, machine) == 2
    assert cost.workers(replace(layers, split="shards"), machine) == 4
    assert cost.swept(layers) == 1e5 and cost.swept(replace(layers, split="shards")) == 5e4


def test_one_device_sends_nothing(cost, machine, run, network):
    alone = replace(machine, devices=1)
    assert cost.collective_seconds(run, alone, network) == cost.gradient_seconds(run, alone, network) == 0


def test_a_frozen_model_sweeps_and_sends_nothing(cost, machine, run, network):
    frozen = replace(run, trained=0)
    assert cost.sweep_seconds(frozen, machine) == cost.sign_seconds(frozen, machine) == 0
    assert cost.gradient_seconds(frozen, machine, network) == network.latency
    assert cost.backward_seconds(frozen, machine) == pytest.approx(
        2 * cost.filled(frozen, machine) * cost.pass_seconds(frozen, machine)
    )


def test_a_model_that_does_not_fit_is_refused(cost, machine, run):
    cost.refuse_unfit(run, machine)
    with pytest.raises(ValueError, match=r"^copy_devices=1: each would hold 0.04 GB of weights, and has 0.01 GB .*\.$"):
        cost.refuse_unfit(replace(run, parameters=1e7), machine)
    with pytest.raises(ValueError, match="make up no whole copies"):
        cost.refuse_unfit(replace(run, copy_devices=3), machine)


# ---- The busiest process ----


def test_one_worker_has_the_expected_number_of_rows(cost, machine, run):
    alone = replace(machine, devices=1)
    assert cost.micro_batches(replace(run, micro_batch=1), alone) == pytest.approx(8)


@pytest.mark.parametrize(("micro_batch", "fixed", "room"), [(1, False, 1), (3, False, 3), (3, True, 2), (1, True, 1)])
def test_the_load_of_the_busiest_worker_matches_simulated_draws(cost, machine, run, micro_batch, fixed, room):
    drawn = np.random.default_rng(0).poisson(8 / 4, size=(200_000, 4)).max(axis=1)
    asked = replace(run, micro_batch=micro_batch, fixed_shapes=fixed)
    loads = np.ceil(drawn / room)
    assert cost.micro_batches(asked, machine) == pytest.approx(loads.mean(), rel=5e-3)
    paid = loads if fixed else drawn / micro_batch  # Missing rows cost something in fixed shapes alone.
    assert cost.filled(asked, machine) == pytest.approx(paid.mean(), rel=5e-3)


def test_of_64_workers_with_16_rows_each_the_busiest_has_26(cost, machine, run):
    many = replace(run, rows=1024, micro_batch=1)
    assert cost.micro_batches(many, replace(machine, devices=64)) == pytest.approx(26.1, abs=0.05)


# ---- Monotonicity ----


@pytest.mark.parametrize("field", ["parameters", "trained", "weight_bytes", "tokens", "rows", "directions"])
@pytest.mark.parametrize("split", ["layers", "shards"])
def test_more_of_anything_takes_longer(cost, machine, run, network, field, split):
    least = replace(run, copy_devices=2, split=split, tokens=1)  # Few enough that reading the weights counts too.
    more = replace(least, **{field: 100 * getattr(least, field)})
    assert cost.step_seconds(more, machine, network) > cost.step_seconds(least, machine, network)


@pytest.mark.parametrize("field", ["flops", "memory_bandwidth", "host_bandwidth"])
def test_a_faster_machine_takes_less_time(cost, machine, run, network, field):
    split = replace(run, copy_devices=2)
    faster = replace(machine, **{field: 2 * getattr(machine, field)})
    assert cost.step_seconds(split, faster, network) < cost.step_seconds(split, machine, network)


def test_network_traffic_does_not_grow_with_the_model(cost, machine, run, network):
    huge = replace(run, parameters=1e12, trained=1e12)
    assert cost.collective_seconds(huge, machine, network) == cost.collective_seconds(run, machine, network)
    assert cost.gradient_seconds(huge, machine, network) > 1e6


# ---- What the code does ----


@pytest.mark.parametrize("name", sorted(DIFFERENCES))
@pytest.mark.parametrize("directions", [1, 3])
def test_modelled_sweeps_and_draws_match_those_of_a_step(run, monkeypatch, name, directions):
    pytest.importorskip("numba")  # Without it no words are cached, and more are drawn.
    monkeypatch.setattr("hf_dpzo.zo.directions.MIN_COORDINATES_TO_COMPILE", 1)
    parameter = torch.nn.Parameter(torch.zeros(100))
    optimizer = ZOOptimizer([parameter], directions=Rademacher, seed=0, lr=1e-3)
    optimizer.begin_stage()
    sweeps, draws = [], []
    add_, at = Rademacher.add_, Stream.seek
    monkeypatch.setattr(Rademacher, "add_", lambda *args, **rest: (sweeps.append(1), add_(*args, **rest))[1])
    monkeypatch.setattr(Stream, "seek", lambda *args: (draws.append(1), at(*args))[1])
    difference = DIFFERENCES[name](smoothing=1e-2, num_directions=directions)
    walk = AddingWalk([parameter], optimizer.directions, step=0, points=difference.points)
    with optimizer.follow(walk, step=0):
        assert len(list(walk)) == difference.forward_passes
    optimizer.receive(step=0, coefficients=[1.0] * directions)
    optimizer.step()
    modelled = replace(run, directions=directions, difference=name)
    assert (len(sweeps), len(draws)) == (modelled.sweeps, modelled.draws)
    assert difference.forward_passes == modelled.points


@pytest.mark.parametrize("directions", [1, 64])
def test_two_collectives_of_eight_bytes_for_each_direction_are_sent(cost, run, directions):
    class Counting(SingleProcess):
        def __init__(self) -> None:
            self.sent = []

        def reduce_sum(self, values: np.ndarray) -> np.ndarray:
            self.sent.append(values.nbytes)
            return values

        def broadcast(self, values: np.ndarray) -> np.ndarray:
            return self.reduce_sum(values)

    group = Counting()
    differences = CentralDifference(smoothing=1.0, num_directions=directions).coefficients(
        torch.zeros(5, 2 * directions)
    )
    GaussianSum(clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=4).release(differences, group)
    assert group.sent == [cost.collective_bytes(replace(run, directions=directions))] * 2 == [8 * directions] * 2


# ---- The page, the plan and the measurements ----


def test_the_page_has_the_table_that_the_command_prints(scale, capsys):
    scale.tables.main()
    assert capsys.readouterr().out in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_a_plan_fits_its_machine_and_all_its_fields_are_used(scale):
    plan = yaml.safe_load(scale.tables.PLAN.read_text(encoding="utf-8"))
    rows = list(scale.tables.steps(plan))
    assert len(rows) == 2 + len(plan["scenarios"]) * len(plan["directions"])
    plan["scenarios"][-1]["run"]["copy_devices"] = 1
    with pytest.raises(ValueError, match="split a copy over more devices"):
        list(scale.tables.steps(plan))


def test_doctests_pass(scale):
    assert doctest.testmod(scale.cost).failed == doctest.testmod(scale.tables).failed == 0


def test_fitted_constants_are_the_known_ones_and_never_negative(scale):
    assert scale.scale.fitted([(1, 0), (1, 2), (1, 4)], [3, 7, 11]) == pytest.approx([3, 2])
    assert scale.scale.fitted([(1, 1), (1, 2), (1, 3)], [1, 2, 3]) == pytest.approx([0, 1], abs=1e-9)
    assert scale.scale.fitted([(1, 1), (1, 2)], [1, 3])[0] == 0


def test_a_machine_that_cannot_limit_a_network_is_detected(scale, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not scale.ranks.limits_work()


def test_processes_that_fail_are_reported_in_one_sentence(scale, monkeypatch, tmp_path):
    monkeypatch.setattr(scale.ranks.sys, "executable", "false")
    with pytest.raises(SystemExit, match=r"^2 processes: they failed, and the last that they said is: nothing$"):
        scale.ranks.measured(2, [])
