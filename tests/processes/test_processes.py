"""Several processes: one guarantee, one release, one set of weights."""

import os

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DataCollatorWithPadding, TrainerCallback

from hf_dpzo import Trajectory, ZOTrainer
from hf_dpzo.data.collation import LogicalBatch, MicroBatch
from hf_dpzo.data.sampling import Drawn, Fetched, PoissonBatchSampler, SameBatches, batch_capacity
from hf_dpzo.data.units import Units
from hf_dpzo.distributed.processes import ALONE, Group, checksum, processes
from hf_dpzo.models.fingerprints import values_fingerprint
from hf_dpzo.privacy.mechanism import ClippedSum, GaussianSum, PlainMean
from hf_dpzo.privacy.noise import BernoulliMask, DiscreteGaussian
from hf_dpzo.step.point_parallel import PointParallelEstimate
from hf_dpzo.trainer import trainer as trainer_module
from hf_dpzo.trajectory.log import TrajectoryWriter
from hf_dpzo.zo.spsa import ForwardDifference
from hf_dpzo.zo.walk import Stop

from support.models import classifier, with_lora
from support.processes import ROWS, ended, frozen, in_each
from support.rows import few_public_rows, labelled_rows


@pytest.fixture
def train(make_args, tokenizer):
    """Trains in this process. Shapes are public, so that a row's loss has the same bits in any batch."""

    def run(*, model=None, rows=None, resume=False, callbacks=(), **changes) -> ZOTrainer:
        trainer = ZOTrainer(
            model=model or with_lora(classifier()),
            args=make_args(**{"padded_lengths": [16], **changes}),
            train_dataset=labelled_rows(ROWS) if rows is None else rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            probe_rows=few_public_rows(),
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def weights(trainer: ZOTrainer) -> str:
    return values_fingerprint([p for p in trainer.model.parameters() if p.requires_grad])


def released(folder) -> list[tuple[int, ...]]:
    return [tuple(record.integers) for record in Trajectory.read(folder).records]


CASES = {
    "adapter": {},
    "all parameters": {"model": classifier, "learning_rate": 1e-3},
    "directions": {"method": "aggzo", "num_directions": 3, "difference": "forward"},
    "adam": {"update": "adam"},
}


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_releases_the_same_integers_and_ends_at_the_same_bits(name, train, tmp_path):
    found = {}
    for size in (1, 2, 3, 4):
        folder = tmp_path / str(size)

        def work(rank: int, size: int = size, folder=folder) -> str:
            frozen(rank, size)
            model = CASES[name].get("model", lambda: with_lora(classifier()))()
            return weights(train(**{**CASES[name], "model": model, "output_dir": str(folder)}))

        ends = in_each(size, work)
        assert len(set(ends)) == 1
        found[size] = ends[0], released(folder)
    assert found[1] == found[2] == found[3] == found[4]
    assert len(found[1][1]) == 4 and len(set(found[1][1])) > 1


def test_users_are_drawn_by_one_process_each(train, tmp_path):
    rows = labelled_rows(ROWS).add_column("user", [f"u{i % 10}" for i in range(ROWS)])
    found = []
    for size in (1, 3):
        folder = tmp_path / str(size)

        def work(rank: int, size: int = size, folder=folder) -> str:
            frozen(rank, size, units=10)
            unit = {"privacy_unit_column": "user", "max_rows_per_unit": 4, "expected_batch_size": 2}
            return weights(train(rows=rows, output_dir=str(folder), **unit))

        found.append((in_each(size, work)[0], released(folder)))
    assert found[0] == found[1]


# ---- Batches ----


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_unit_belongs_to_one_process(size):
    units = Units(num_rows=7)
    everybody = [
        next(iter(PoissonBatchSampler(units=units, sampling_rate=1.0, rank=rank, processes=size)))
        for rank in range(size)
    ]
    assert sorted(one.row for share in everybody for one in share) == list(range(7))


def test_what_processes_draw_together_is_one_poisson_batch():
    """Sizes are binomial, and two rows join independently, whether they are of one share or of two."""
    rate, steps, size = 0.3, 4000, 3
    samplers = [
        PoissonBatchSampler(units=Units(num_rows=9), sampling_rate=rate, rank=rank, processes=size)
        for rank in range(size)
    ]
    joined = np.zeros((steps, 9))
    for step in range(steps):
        for sampler in samplers:
            joined[step, [one.row for one in next(iter(sampler))]] = 1
    spread = 5 * np.sqrt(rate * (1 - rate) / steps)
    assert np.abs(joined.mean(axis=0) - rate).max() < spread
    assert all(np.abs(joined.mean(axis=0) - scale * rate).min() > spread for scale in (2 / 3, 3 / 2))
    correlation = np.corrcoef(joined.T) - np.eye(9)
    assert np.abs(correlation).max() < 5 / np.sqrt(steps)
    assert joined.sum(axis=1).var() == pytest.approx(9 * rate * (1 - rate), rel=0.15)


def test_no_process_repeats_anothers_draws(train, tmp_path):
    """Each draws from its own operating system, after a fork too."""

    def work(rank: int) -> list[list[int]]:
        sampler = PoissonBatchSampler(units=Units(num_rows=200), sampling_rate=0.1, rank=rank, processes=2)
        processes(torch.device("cpu"))
        train(output_dir=str(tmp_path / "run"), max_steps=1)
        return [[one.row // 2 for one in batch] for batch in sampler]

    assert len(set(map(str, in_each(2, work)))) == 2


@pytest.mark.parametrize("who", ["nobody", "the last one", "the first one", "alternating"])
def test_empty_and_uneven_shares_do_not_hang(who, train, tmp_path):
    def work(rank: int) -> str:
        steps = iter(range(1000))

        def draw(mask: BernoulliMask) -> np.ndarray:
            step = next(steps)
            joins = {"nobody": False, "the last one": rank == 2, "the first one": rank == 0}
            return np.full(mask.size, joins.get(who, (rank + step) % 2 == 0))

        BernoulliMask.draw = draw
        return weights(train(output_dir=str(tmp_path / "run"), per_device_train_batch_size=2))

    assert len(set(in_each(3, work))) == 1
    assert len(released(tmp_path / "run")) == 4


# ---- The release ----


def test_the_first_process_alone_sees_the_sum_and_draws_noise_once(make_args):
    mechanism = GaussianSum(clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)

    def work(rank: int):
        make_args()  # Which joins the group.
        group, drawn = processes(torch.device("cpu")), []
        sums = group.sum(np.array([rank + 1, 2**61]))
        add = DiscreteGaussian.add
        DiscreteGaussian.add = lambda self, values: drawn.append(values) or add(self, values)
        release = mechanism.release(torch.full((rank, 2), 0.25, dtype=torch.float64), group)
        return None if sums is None else sums.tolist(), drawn, release

    (sums, drawn, release), *others = in_each(3, work)
    assert sums == [6, 3 * 2**61]
    assert drawn == [[3 * 2**38, 3 * 2**38]]
    assert [other[:2] for other in others] == [(None, []), (None, [])]
    assert all(other[2] == release for other in others)


@pytest.mark.parametrize("mechanism", [ClippedSum(clip_norm=1.0, expected_batch_size=4), PlainMean()])
def test_without_noise_shares_make_the_release_of_the_whole_batch(mechanism, make_args):
    rows = torch.tensor([[0.5, -0.25], [0.125, 0.5], [0.0, 0.75]], dtype=torch.float64)

    def work(rank: int):
        make_args()
        return mechanism.release(rows[rank::2], processes(torch.device("cpu")))

    assert in_each(2, work) == [mechanism.release(rows, ALONE)] * 2


@pytest.mark.parametrize("num_directions", [1, 16])
def test_a_step_sends_eight_bytes_a_direction_twice(num_directions, make_args):
    """Whatever the model's size: the sums to the first process, and the release back."""
    mechanism = GaussianSum(clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)

    def work(rank: int) -> list[int]:
        make_args()
        sent, pack = [], Group._sent
        Group._sent = lambda self, values: sent.append(values.nbytes) or pack(self, values)
        mechanism.release(torch.zeros(1, num_directions), processes(torch.device("cpu")))
        return sent

    assert in_each(2, work) == [[8 * num_directions] * 2] * 2


# ---- What processes must share ----


def test_initial_weights_are_those_of_the_first_process(train, tmp_path):
    def work(rank: int) -> tuple[str, str]:
        base = classifier()
        torch.manual_seed(rank)
        model = with_lora(base)
        before = values_fingerprint([p for p in model.parameters() if p.requires_grad])
        return before, weights(train(model=model, output_dir=str(tmp_path / "run")))

    (before, after), (other_before, other_after) = in_each(2, work)
    assert before != other_before
    assert after == other_after


def different_model(rank: int) -> dict:
    torch.manual_seed(rank)
    return {"model": with_lora(classifier())}


def different_plan(rank: int) -> dict:
    return {"max_steps": 4 + rank}


def different_loop(rank: int) -> dict:
    return {"logging_steps": 1 + rank}


def swapped_rows(rank: int) -> dict:
    order = list(range(ROWS))
    order[20 : 20 + 2] = [21, 20][:: 1 if rank else -1]
    return {"rows": labelled_rows(ROWS).select(order)}


def different_order(rank: int) -> dict:
    return {"rows": labelled_rows(ROWS).shuffle(seed=rank)}


def different_rows(rank: int) -> dict:
    return {"rows": labelled_rows(ROWS, seed=rank)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (different_model, "processes: 2 were launched, and they do not train the same"),
        (different_plan, "args: the 2 processes do not have the same "),
        (different_loop, "args: the 2 processes do not have the same "),
        (swapped_rows, "train_dataset: the 2 processes do not hold the same rows in the same order"),
        (different_order, "train_dataset: the 2 processes do not hold the same rows in the same order"),
        (different_rows, "train_dataset: the 2 processes do not hold the same rows in the same order"),
    ],
)
def test_processes_that_differ_are_refused_in_each_of_them(given, message, train, tmp_path):
    found = ended(2, lambda rank: train(output_dir=str(tmp_path / "run"), **given(rank)) and None)
    assert all(one.error.startswith(f"ValueError: {message}") for one in found), found
    assert not (tmp_path / "run" / "trajectory.zo").exists()


class Broken(TrainerCallback):
    """Changes the model in one process, or ends it."""

    def __init__(self, rank: int, *, after: int, kill: bool = False) -> None:
        self._rank, self._after, self._kill = rank, after, kill

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self._rank == 1 and state.global_step == self._after:
            if self._kill:
                os._exit(1)
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1e-3


@pytest.mark.parametrize(("every", "steps"), [(1, 2), (100, 4)])
def test_weights_that_diverged_stop_the_run_in_each_process(every, steps, train, tmp_path):
    """At the next comparison, or when training ends."""

    def work(rank: int) -> None:
        trainer_module.CHECKED_EVERY = every
        train(output_dir=str(tmp_path / "run"), callbacks=[Broken(rank, after=2)])

    found = ended(2, work)
    message = f"RuntimeError: step={steps}: the 2 processes no longer hold the same weights"
    assert all(one.error.startswith(message) for one in found), found


def test_checksum_sees_bits_anywhere():
    tensors = [torch.randn(3), torch.randn(1_500_001), torch.randn(5, 5), torch.randn(7, dtype=torch.float64)]
    before = checksum(tensors)
    assert checksum([one.clone() for one in tensors]) == before
    words = [one.view(-1).view(torch.int32) for one in tensors]
    places = [(0, 0), (1, 1_500_000), (1, 16_384), (1, 16_385), (1, 1_048_577), (2, 24), (3, 13)]
    for bit in (0, 15, 31):
        flip = -(2**31) if bit == 31 else 1 << bit
        for some in (*[[place] for place in places], places, places[1:3], places[2:4]):
            for tensor, place in some:
                words[tensor][place] ^= flip
            assert checksum(tensors) != before, (bit, some)
            for tensor, place in some:
                words[tensor][place] ^= flip
    assert checksum(tensors) == before
    assert checksum(tensors[::-1]) != before


# ---- Lost, and restarted with others ----


@pytest.mark.parametrize(("model", "checkpoints"), [(classifier, "no"), (None, "steps")])
def test_a_lost_process_ends_the_job_and_another_number_of_them_goes_on(model, checkpoints, train, tmp_path):
    folder = str(tmp_path / "run")
    given = {"output_dir": folder, "max_steps": 8, "save_strategy": checkpoints, "save_steps": 2}

    def begun(rank: int) -> None:
        train(model=model and model(), callbacks=[Broken(rank, after=3, kill=True)], **given)

    first, lost = ended(2, begun)
    assert lost.killed and first.error
    steps = len(released(folder))
    assert steps in (3, 4)
    before = released(folder)
    for size in (3, 1):
        again = ended(size, lambda rank: weights(train(model=model and model(), resume=True, **given)))
        assert len({one.returned for one in again}) == 1 and again[0].returned, again
    assert released(folder)[:steps] == before
    assert len(released(folder)) == 8


@pytest.mark.parametrize("model", [classifier, None], ids=["all parameters", "adapter"])
def test_no_process_learns_what_could_not_be_logged(model, train, tmp_path):
    """The record comes first. So the weights of the others have not moved when the first one fails."""
    ends = tmp_path / "ends"
    ends.mkdir()

    class Kept(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            (ends / f"{args.process_index}-{state.global_step}").touch()

    def work(rank: int) -> None:
        append = TrajectoryWriter.append

        def full(writer, record) -> None:
            if record.step == 2:
                raise OSError("the disk is full")
            append(writer, record)

        TrajectoryWriter.append = full
        train(model=model and model(), output_dir=str(tmp_path / "run"), callbacks=[Kept()])

    first, second = ended(2, work)
    assert "the disk is full" in first.error and second.error
    assert sorted(path.name for path in ends.iterdir()) == ["0-1", "0-2", "1-1", "1-2"]
    assert len(released(tmp_path / "run")) == 2


def test_errors_of_the_first_process_reach_the_others_whatever_they_are(make_args):
    class Odd(Exception):
        """Can not be sent: it is no module's own."""

    def failing(kind):
        def make():
            raise kind("why")

        return make

    def work(rank: int) -> list[str]:
        make_args()
        group, said = processes(torch.device("cpu")), []
        for kind in (OSError, Odd, KeyboardInterrupt):
            try:
                group.by_first(failing(kind))
            except BaseException as error:
                said.append(f"{type(error).__name__}: {error}")
        with pytest.raises(Exception, match="pickle"):
            group.by_first(lambda: lambda: None)
        return said

    assert in_each(2, work) == [["OSError: why", "RuntimeError: Odd: why", "KeyboardInterrupt: why"]] * 2


def test_resuming_what_is_not_there_fails_in_each_process(train, tmp_path):
    found = ended(2, lambda rank: train(output_dir=str(tmp_path / "none"), resume=True) and None)
    assert all("holds no log of a run" in one.error for one in found), found


# ---- Points, spread over processes ----


@pytest.mark.parametrize("name", ["adapter", "all parameters", "directions", "adam"])
def test_points_may_be_spread_over_any_number_of_processes(name, train, tmp_path):
    """With the same integers and bits as in one process; micro-batches too are those of one process."""
    found = {}
    for size in (1, 2, 3, 4):
        folder = tmp_path / str(size)

        def work(rank: int, size: int = size, folder=folder) -> str:
            frozen(0, 1, seed=rank)  # What the others draw is not used.
            model = CASES[name].get("model", lambda: with_lora(classifier()))()
            spread = {"padded_lengths": None, "parallel": "points", "output_dir": str(folder)}
            return weights(train(**{**CASES[name], **spread, "model": model}))

        ends = in_each(size, work)
        assert len(set(ends)) == 1
        found[size] = ends[0], released(folder)
    assert found[1] == found[2] == found[3] == found[4]


class Batches(list):
    """A sampler of given batches."""


def drawn(*rows: int) -> list[Drawn]:
    return [Drawn(unit=row % 3, row=row, place=place) for place, row in enumerate(rows)]


def test_all_processes_see_the_batch_of_the_first_one(make_args):
    def work(rank: int) -> tuple[list, list]:
        make_args()
        group, shapes, pack = processes(torch.device("cpu")), [], Group._sent
        Group._sent = lambda self, values: shapes.append(values.shape) or pack(self, values)
        own = [drawn(rank), drawn(), drawn(7 + rank, 4, 8), drawn(*range(9))]
        return list(SameBatches(Batches(own), group, capacity=5)), shapes

    (first, shapes), (second, others) = in_each(2, work)
    assert first == second == [drawn(0), drawn(), drawn(7, 4, 8), drawn(0, 1, 2, 3, 4)]
    assert shapes == others == [(5, 2)] * 4, "how many rows there are must not show"


def test_processes_take_turns_and_put_losses_where_their_rows_were_drawn(make_args):
    """The second one could not fetch the row at place 1, and the first one not the one at place 4."""
    places = [[2, 0, 1], [4, 2, 0]]

    def work(rank: int):
        make_args()
        calls = []
        estimate = PointParallelEstimate(
            losses=lambda model, batch: calls.append(stop.index) or torch.tensor([10.0 + one for one in batch.places]),
            processes=processes(torch.device("cpu")),
            capacity=6,
        )
        estimator, losses = ForwardDifference(smoothing=1.0, num_directions=2), []
        rows = tuple(Fetched(unit=place // 2, row=None, place=place) for place in places[rank])
        batch = LogicalBatch(micro_batches=(MicroBatch(rows=rows, size=3, inputs=None),), num_units=3)
        for index, point in enumerate(estimator.points):
            stop = Stop(index=index, points=(point,))
            losses.append((1 + index) * estimate.evaluate(stop, None, batch))
        return calls, estimate.coefficients(losses, batch, estimator)

    (calls, coefficients), (other_calls, nothing) = in_each(2, work)
    assert (calls, other_calls) == ([0, 2], [1])
    # Place 1, of which the second process has no row, counts as zero beside place 0 in their unit's mean.
    halves = torch.tensor([[10 / 2 / 2, 2 * (10 + 11) / 2 / 2], [12 / 2, 2 * 12 / 2], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(coefficients, halves, rtol=0, atol=1e-12)
    assert nothing.shape == (0, 2)


def test_a_row_that_one_process_fails_on_moves_no_other_row(train, tmp_path):
    """Users of two rows each; one row is broken in the second process alone, so that its losses are not finite."""
    rows = labelled_rows(ROWS).add_column("user", [f"u{i // 2}" for i in range(ROWS)]).to_list()

    class Failing(torch.utils.data.Dataset):
        def __init__(self, broken: bool) -> None:
            self._broken = broken

        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, place: int) -> dict:
            if self._broken and place == 7 and Failing.armed:
                raise OSError
            return rows[place]

    Failing.armed = False

    class Arm(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            Failing.armed = True

    sums = {}
    for broken in (False, True):

        def work(rank: int, broken: bool = broken) -> list[list[int]]:
            seen = []
            BernoulliMask.draw = lambda mask: np.arange(mask.size) < 8
            DiscreteGaussian.add = lambda self, values: seen.append(list(values)) or values
            unit = {"privacy_unit_column": "user", "max_rows_per_unit": 2, "expected_batch_size": 2}
            told = {"parallel": "points", "output_dir": str(tmp_path / str(broken)), "max_steps": 1, "clip_norm": 1e4}
            train(rows=Failing(broken and rank == 1), callbacks=[Arm()], **unit, **told)
            return seen

        sums[broken] = in_each(2, work)[0]
    moved = abs(sums[True][0][0] - sums[False][0][0])
    assert 0 < moved <= 2**40, "one unit counts for less, and no other one for anything else"


def test_room_is_more_than_any_batch_needs():
    for mean in (1, 8, 64, 1000):
        assert stats.poisson.sf(batch_capacity(mean), mean) < 1e-17
        assert batch_capacity(mean) < 54 * mean


def test_empty_batches_pass_where_points_are_spread(train, tmp_path):
    def work(rank: int) -> str:
        BernoulliMask.draw = lambda mask: np.zeros(mask.size, dtype=bool)
        return weights(train(output_dir=str(tmp_path / "run"), parallel="points"))

    assert len(set(in_each(2, work))) == 1


def test_points_are_spread_or_joined_in_a_pass_but_not_both(make_args):
    with pytest.raises(ValueError, match=r"^points_per_pass=2: points are spread over processes already; "):
        make_args(points_per_pass=2, parallel="points")
