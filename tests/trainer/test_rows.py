"""The rows that are trained on are those that the budget was planned for, however they reach the training loop."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import ConcatDataset, DataLoader, Subset, WeightedRandomSampler
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer
from hf_dpzo.data.units import Units
from hf_dpzo.losses.function import FunctionLoss

from support.models import one_layer, word_tokenizer
from support.rows import few_public_rows, labelled_rows


COUNT = 20
# Sorted by user, as a data base gives them.
OF_USERS = labelled_rows(COUNT).add_column("user", [f"u{number // 4}" for number in range(COUNT)])
AS_LIST = OF_USERS.to_list()


class Rows(torch.utils.data.Dataset):
    """A data set whose rows can be put in another order."""

    def __init__(self, rows) -> None:
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index])


@pytest.fixture
def make(make_args):
    def made(rows, kind=ZOTrainer, **changes) -> ZOTrainer:
        return kind(
            model=one_layer(),
            args=make_args(max_steps=1, expected_batch_size=4, **changes),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(word_tokenizer()),
            probe_rows=few_public_rows(),
        )

    return made


def replace(trainer):
    trainer.train_dataset = OF_USERS.shuffle(seed=3)


def replace_one(trainer):
    trainer.train_dataset = OF_USERS.select([4, 1, 2, 3, 0, *range(5, COUNT)])


def replace_user(trainer):
    users = [*OF_USERS["user"]]
    users[0] = users[4]
    trainer.train_dataset = OF_USERS.remove_columns("user").add_column("user", users)


def shuffle_list(trainer):
    trainer.train_dataset.rows.append(trainer.train_dataset.rows.pop(0))


def own_columns(trainer):
    trainer._remove_unused_columns = lambda dataset, description=None: dataset.shuffle(seed=3)


def forgetful_columns(trainer):
    trainer._remove_unused_columns = lambda dataset, description=None: dataset.remove_columns("user")


class Shuffling(ZOTrainer):
    def _get_dataloader(self, dataset, *args, **options):
        return super()._get_dataloader(dataset.shuffle(seed=3), *args, **options)


CHANGES = {
    "attribute": (OF_USERS, replace, ZOTrainer),
    "attribute, one row": (OF_USERS, replace_one, ZOTrainer),
    "attribute, one user": (OF_USERS, replace_user, ZOTrainer),
    "in place": (Rows(AS_LIST), shuffle_list, ZOTrainer),
    "columns": (OF_USERS, own_columns, ZOTrainer),
    "columns without users": (OF_USERS, forgetful_columns, ZOTrainer),
    "loader": (OF_USERS, lambda trainer: None, Shuffling),
}


# Stock does not ask which columns to remove where it keeps all.
@pytest.mark.parametrize(
    ("how", "removed"), [*((how, True) for how in CHANGES), ("attribute", False), ("loader", False)]
)
def test_rows_in_whose_places_other_users_rows_are_are_refused(how, removed, make, tmp_path):
    rows, change, kind = CHANGES[how]
    options = {"privacy_unit_column": "user", "remove_unused_columns": removed}
    trainer = make(copy.deepcopy(rows), kind, **options)
    change(trainer)
    with pytest.raises(ValueError, match=r"train_dataset: it is not the one|privacy_unit_column=user: not all rows"):
        trainer.train()


@pytest.mark.parametrize("rows", [OF_USERS, AS_LIST, Rows(AS_LIST)], ids=["table", "list", "data set"])
def test_rows_of_users_train_and_whose_they_are_reaches_no_collator(rows, make):
    trainer = make(rows, privacy_unit_column="user")
    seen = []
    trainer.data_collator = lambda batch: seen.extend(batch) or DataCollatorWithPadding(word_tokenizer())(batch)
    trainer.train()
    assert seen and not any("user" in row for row in seen)


def test_other_rows_of_as_many_users_are_refused_by_their_number_too(make):
    trainer = make(labelled_rows(COUNT))
    trainer.train_dataset = labelled_rows(COUNT + 1)
    with pytest.raises(ValueError, match="train_dataset: it is not the one that the budget was planned for"):
        trainer.train()


def test_units_are_the_same_where_the_same_rows_belong_together():
    units = Units.from_users(["ann", "bob", "ann"], max_rows=2)
    assert units.has_same_members(Units.from_users(["x", "y", "x"], max_rows=2))
    others = (["ann", "ann", "bob"], ["ann", "bob", "bob"], ["ann", "bob", "cid"], ["ann", "bob", "ann", "bob"])
    assert not any(units.has_same_members(Units.from_users(users, max_rows=2)) for users in others)
    assert not units.has_same_members(Units.from_users(["ann", "bob", "ann"], max_rows=1))
    assert not units.has_same_members(Units(num_rows=3))
    assert Units(num_rows=3).has_same_members(Units(num_rows=3))


TABLE = labelled_rows(COUNT)
LIST = TABLE.to_list()
COPIES = {
    "joined": lambda: concatenate_datasets([TABLE, TABLE]),
    "subset": lambda: Subset(LIST, [0, *range(COUNT)]),
    "drawn": lambda: Subset(TABLE, list(WeightedRandomSampler([1.0] * COUNT, 2 * COUNT))),
    "concatenated": lambda: ConcatDataset([TABLE, Subset(TABLE, [3])]),
}


@pytest.mark.parametrize("when", ["given", "set later", "made by the loader"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_that_a_structure_shows_are_refused_whenever_they_are_given(how, when, make):
    rows = COPIES[how]()

    class Joining(ZOTrainer):
        def _get_dataloader(self, dataset, *args, **options):
            return super()._get_dataloader(rows, *args, **options)

    with pytest.raises(ValueError, match=r"it holds a row more than once|train_dataset: it is not the one"):
        if when == "set later":
            trainer = make(TABLE)
            trainer.train_dataset = rows
        else:
            trainer = make(rows if when == "given" else TABLE, ZOTrainer if when == "given" else Joining)
        trainer.train()


def test_copies_are_taken_where_users_are_the_unit(make):
    rows = OF_USERS.select([0, *range(COUNT)])
    make(rows, privacy_unit_column="user").train()


class Weighted(ZOTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return WeightedRandomSampler([1.0] * COUNT, COUNT)


def test_a_sampler_that_poisson_batches_would_replace_is_refused(make):
    with pytest.raises(ValueError, match=r"_get_train_sampler=Weighted\..*: batches are Poisson samples"):
        make(TABLE, Weighted)


class AllRows(ZOTrainer):
    """Everybody in each batch, drawn by nobody."""

    def get_train_dataloader(self):
        poisson = super().get_train_dataloader()
        batches = [next(iter(poisson.batch_sampler))] * 4
        return DataLoader(poisson.dataset, batch_sampler=batches, collate_fn=poisson.collate_fn)


class Stock(ZOTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)


@pytest.mark.parametrize("kind", [AllRows, Stock])
def test_another_loader_than_that_of_poisson_batches_is_refused(kind, make):
    with pytest.raises(ValueError, match="get_train_dataloader: it returns another loader"):
        make(TABLE, kind).train()


def test_no_user_is_two_units_after_a_shuffle_between_construction_and_training(make, sums):
    """One user more moves the sum by at most one sensitivity, or the run does not begin."""

    def loss(model, inputs):
        return model.score.weight[0, 0] * (inputs["input_ids"][:, 0] == 40).float() * 1e4

    def moved(shuffled: bool) -> float:
        found = []
        for ann in (True, False):
            rows = [{"input_ids": [40, 7], "attention_mask": [1, 1], "labels": 1, "user": "ann"}] * 16 * ann
            rows += [{"input_ids": [5, 7], "attention_mask": [1, 1], "labels": 0, "user": f"u{i}"} for i in range(16)]
            rows = Dataset.from_list(rows)
            torch.manual_seed(0)
            trainer = make(rows, privacy_unit_column="user", max_rows_per_unit=4)
            trainer.per_example_loss = FunctionLoss(loss)
            if shuffled:
                trainer.train_dataset = rows.shuffle(seed=3)
            trainer.train()
            found.append(np.array(sums[-1], dtype=float))
        return abs(found[0] - found[1])[0] / 2**40

    assert 0 < moved(shuffled=False) <= 1
    with pytest.raises(ValueError, match="train_dataset: it is not the one"):
        moved(shuffled=True)


def test_a_list_of_earlier_runs_that_is_added_to_after_planning_is_refused(make, tmp_path):
    make(TABLE, output_dir=str(tmp_path / "first")).train()
    make(TABLE, output_dir=str(tmp_path / "other")).train()
    trainer = make(TABLE, earlier_runs=[str(tmp_path / "first")])
    trainer.args.earlier_runs.append(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"earlier_runs=.*: the budget was planned with earlier_runs="):
        trainer.train()


def test_a_model_that_is_exchanged_in_the_trainer_alone_is_refused(make):
    """Stock would move the new one, and evaluate the one that it wrapped before."""
    trainer = make(TABLE)
    trainer.model = one_layer()
    with pytest.raises((ValueError, RuntimeError), match=r"model: another one evaluates|outputs are the same"):
        trainer.train()
