"""All rows of a user are one unit: they are drawn together, and move a release by at most one clip norm together."""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer
from hf_dpzo.data.sampling import PoissonBatchSampler
from hf_dpzo.data.units import Units, average_by_unit
from hf_dpzo.privacy.clipping import SENSITIVITY, clip_to_lattice
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
from hf_dpzo.trajectory.writer import TrajectoryWriter

from support.models import one_layer
from support.rows import labelled_rows


USERS = ["ann", "bob", "ann", "cyd", "ann", "bob", "dan", "ann"]


def with_users(users=USERS) -> Dataset:
    return labelled_rows(len(users)).add_column("user", users)


def test_all_rows_of_a_user_are_drawn_together():
    units = Units.from_users(USERS, max_rows=8)
    assert len(units) == 4
    for batch in list(PoissonBatchSampler(units=units, sampling_rate=0.4)) * 50:
        rows = {fetched.row for fetched in batch}
        for user in set(USERS):
            own = {row for row, other in enumerate(USERS) if other == user}
            assert own <= rows or not own & rows
        assert {fetched.unit for fetched in batch} == set(range(len({USERS[fetched.row] for fetched in batch})))
        for unit in {fetched.unit for fetched in batch}:
            assert len({USERS[fetched.row] for fetched in batch if fetched.unit == unit}) == 1


def test_users_are_drawn_equally_often_whatever_their_number_of_rows():
    units, counts = Units.from_users(USERS, max_rows=8), np.zeros(4)
    sampler, batches = PoissonBatchSampler(units=units, sampling_rate=0.25), 4000
    drawn = [batch for _ in range(batches // len(sampler)) for batch in sampler]
    for batch in drawn:
        for user in {USERS[fetched.row] for fetched in batch}:
            counts[["ann", "bob", "cyd", "dan"].index(user)] += 1
    assert np.abs(counts / len(drawn) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / len(drawn))


def test_a_user_of_many_rows_brings_a_new_choice_of_them_each_time():
    units = Units.from_users(["ann"] * 10, max_rows=3)
    choices = [tuple(sorted(units.draw_rows(0))) for _ in range(60)]
    assert all(len(set(choice)) == 3 for choice in choices)
    assert set().union(*choices) == set(range(10))


def test_rows_without_a_user_are_one_unit():
    """A missing name does not make each row a unit of its own."""
    units = Units.from_users(["ann", None, math.nan, "ann", None], max_rows=8)
    assert [units.draw_rows(unit) for unit in range(len(units))] == [[0, 3], [1, 2, 4]]


@pytest.mark.parametrize("kind", [None, "torch", "numpy", "pandas"])
def test_users_are_the_same_in_every_format(kind):
    """Tensors are hashed by identity: two with the same number are two objects."""
    rows = Dataset.from_list([{"user": i % 3, "input_ids": [5]} for i in range(9)]).with_format(kind)
    assert len(Units.from_column(rows, "user", max_rows=8)) == 3


def test_users_in_tensors_are_distinguished_by_value():
    rows = [{"user": torch.tensor(i % 3)} for i in range(9)]
    assert len(Units.from_column(rows, "user", max_rows=8)) == 3


def test_rows_with_values_that_are_no_names_are_one_unit():
    units = Units.from_users(["ann", ["a", "list"], {"a": 1}, torch.tensor([1, 2]), object()], max_rows=8)
    assert [units.draw_rows(unit) for unit in range(len(units))] == [[0], [1, 2, 3, 4]]


def test_a_unit_is_the_mean_of_its_own_rows():
    differences = torch.tensor([[1.0, 2.0], [3.0, math.nan], [5.0, math.inf]], dtype=torch.float64)
    assert average_by_unit(differences, [0, 0, 1], 2).tolist() == [[2.0, 1.0], [5.0, 0.0]]
    assert average_by_unit(torch.zeros(0, 2, dtype=torch.float64), [], 0).shape == (0, 2)


def draw_coefficients(random, *shape):
    """Values as differences of float32 losses are, of all sizes, so that each order of adding them rounds otherwise."""
    return random.normal(size=shape).astype(np.float32).astype(np.float64) * 10.0 ** random.integers(-9, 9, shape)


def test_a_users_mean_does_not_depend_on_other_users_to_the_last_bit():
    random = np.random.default_rng(0)
    own = draw_coefficients(random, 500, 7, 3)  # Of 500 users with seven rows each.
    rounded = 0
    for rows in own:
        alone = average_by_unit(torch.from_numpy(rows), [0] * 7, 1)
        others = draw_coefficients(random, 6, 3)
        mixed, places = np.concatenate([rows, others]), random.permutation(13)
        units = np.array([0] * 7 + [1, 1, 2, 3, 3, 3])[places]
        beside = average_by_unit(torch.from_numpy(mixed[places]), units.tolist(), 4)
        assert torch.equal(beside[0], alone[0])
        assert np.array_equal(clip_to_lattice(beside, 1e3)[0], clip_to_lattice(alone, 1e3)[0])
        rounded += not np.array_equal(np.add.reduce(mixed[places][units == 0]), np.add.reduce(rows))
    assert rounded > 100  # A sum that is rounded after each row would have failed.


@pytest.mark.parametrize(
    "values", [[1e308, 1e308, -1e308], [math.nan, 1e-320, 1e16, 1.0, -1e16], [1.0, 2.0**-60, -1.0]]
)
def test_a_mean_is_that_of_the_exact_sum_in_every_order(values):
    means = {
        average_by_unit(torch.tensor(order, dtype=torch.float64)[:, None], [0] * len(order), 1).item()
        for order in itertools.permutations(values)
    }
    exact = sum(Fraction(value) for value in values if math.isfinite(value)) / len(values)
    assert means == {float(exact)}


@pytest.fixture
def make_trainer(make_args, tokenizer):
    def make(users=USERS, **changes) -> ZOTrainer:
        torch.manual_seed(0)
        settings = {"privacy_unit_column": "user", "expected_batch_size": 2, "per_device_train_batch_size": 3}
        return ZOTrainer(
            model=one_layer(),
            args=make_args(**{**settings, **changes}),
            train_dataset=with_users(users),
            eval_dataset=labelled_rows(4, seed=1),
            data_collator=DataCollatorWithPadding(tokenizer),
        )

    return make


@pytest.mark.parametrize("removed", ["ann", "bob", "dan"])
def test_one_user_moves_a_release_by_at_most_the_sensitivity(removed, make_trainer, sums, tokenizer, make_args):
    for users in (USERS, [user for user in USERS if user != removed]):
        trainer = make_trainer(users, max_steps=1, clip_norm=1e-3, per_device_train_batch_size=1)
        trainer.train_dataset = with_users().select([i for i, user in enumerate(USERS) if user in users])
        trainer.train()
    assert 0 < abs(sums[0][0] - sums[1][0]) <= SENSITIVITY


def test_users_are_counted_and_sampled_instead_of_rows(make_trainer):
    trainer = make_trainer()
    assert trainer.args.sampling_rate(4) == trainer.budget.query.sampling_rate == 0.5
    trainer.train()
    assert len(trainer.budget.ledger) == 4


def test_card_says_that_users_are_protected(make_trainer):
    trainer = make_trainer(max_rows_per_unit=3)
    trainer.train()
    trainer.save_model()
    stated = json.loads((Path(trainer.args.output_dir) / "privacy.json").read_text())
    assert stated["claim"]["unit"] == (
        "all rows of one user (column user), of which a batch holds at most 3, as one clipped mean"
    )
    assert stated["claim"]["groups"] == []
    assert (stated["sampling"]["num_units"], stated["sampling"]["num_rows"]) == (4, None)
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "adding or removing all rows of one user" in text
    assert "2 of 4 users expected in a batch" in text
    assert "the number of training users, which is treated as public" in text
    assert "one row" not in text


def test_a_log_of_users_holds_no_number_of_rows_and_one_of_earlier_versions_goes_on(make_trainer):
    trainer = make_trainer()
    trainer.train()
    folder = Path(trainer.args.output_dir)
    log = Trajectory.read(folder)
    assert log.header["rows"]["units"] == 4
    assert log.header["rows"]["rows"] is None
    earlier = {**log.header, "rows": {**log.header["rows"], "rows": 8}}
    writer = TrajectoryWriter.create(folder / LOG_FILE, earlier)
    for record in log.records[:2]:
        writer.append(record)
    writer.close()
    trainer = make_trainer(output_dir=str(folder))
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert json.loads((folder / "privacy.json").read_text())["sampling"]["num_rows"] == 8
    assert len(Trajectory.read(folder).records) == 4


def test_the_column_of_users_does_not_reach_the_collator(make_trainer):
    trainer = make_trainer(remove_unused_columns=False)
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_missing_column_of_users_is_refused(make_trainer):
    with pytest.raises(ValueError, match="privacy_unit_column=person: not all rows of train_dataset have it"):
        make_trainer(privacy_unit_column="person")


def test_a_batch_of_more_users_than_there_are_is_refused(make_trainer):
    with pytest.raises(ValueError, match="expected_batch_size=5: the training data have 4 users; lower it"):
        make_trainer(expected_batch_size=5)


def test_a_limit_on_rows_per_unit_without_users_is_refused(make_args):
    with pytest.raises(ValueError, match="max_rows_per_unit=3: each row is its own unit; set privacy_unit_column too"):
        make_args(max_rows_per_unit=3)
