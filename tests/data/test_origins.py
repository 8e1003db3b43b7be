"""Copies of a row that a data set's structure shows are found, and rows that merely look alike are not."""

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets, interleave_datasets, load_from_disk
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset, WeightedRandomSampler

from hf_dpzo.data.origins import has_repeated_rows


ROWS = [{"tokens": [number, 1], "labels": number} for number in range(50)]
TABLE = Dataset.from_list(ROWS)


@pytest.fixture
def reload(tmp_path):
    """The same file, mapped into memory anew each time."""
    TABLE.save_to_disk(tmp_path)
    return lambda: load_from_disk(tmp_path)


class Around(torch.utils.data.Dataset):
    """What people write around a data set, to change its rows."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


class Half(Around):
    """A wrapper that chooses its rows in a way of its own."""

    def __len__(self):
        return len(self.dataset) // 2


REPEATED = {
    "selected twice": lambda: TABLE.select([3, 0, 3]),
    "repeated": lambda: TABLE.repeat(2),
    "joined with itself": lambda: concatenate_datasets([TABLE, TABLE]),
    "joined with a part of itself": lambda: concatenate_datasets([TABLE, TABLE.select(range(3, 5))]),
    "joined parts that overlap": lambda: concatenate_datasets([TABLE.select([0, 2, 4]), TABLE.select([1, 2])]),
    "joined orders": lambda: concatenate_datasets([TABLE.shuffle(seed=1), TABLE.shuffle(seed=2)]),
    "interleaved with itself": lambda: interleave_datasets([TABLE, TABLE]),
    "interleaved until all end": lambda: interleave_datasets(
        [TABLE.select(range(40)), TABLE.select(range(40, 50))], stopping_strategy="all_exhausted"
    ),
    "joined, and formatted": lambda: concatenate_datasets([TABLE, TABLE]).with_format("torch"),
    "joined, with another column": lambda: concatenate_datasets(
        [TABLE.add_column("more", list(range(50))), TABLE.add_column("more", list(range(50, 100)))]
    ),
    "joined, with a column less": lambda: concatenate_datasets([TABLE.remove_columns("tokens")] * 2),
    "subset": lambda: Subset(TABLE, [1, 1]),
    "subset by negative numbers": lambda: Subset(ROWS, torch.tensor([-1, 49])),
    "subset of a subset": lambda: Subset(Subset(ROWS, [0, 1, 1]), [2, 1]),
    "subset that a sampler drew": lambda: Subset(ROWS, list(WeightedRandomSampler([1.0] * 50, 51))),
    "concatenation": lambda: ConcatDataset([ROWS, ROWS]),
    "concatenated subsets": lambda: ConcatDataset([Subset(ROWS, [0, 1]), Subset(ROWS, [1, 2])]),
    "subset of a concatenation": lambda: Subset(ConcatDataset([TABLE, TABLE]), [7, 57]),
    "stacked": lambda: StackDataset(Subset(TABLE, [4, 4]), Subset(ROWS, [5, 5])),
    "wrapped": lambda: Around(Subset(TABLE, [4, 4])),
    "joined wrappers": lambda: ConcatDataset([Around(TABLE), Around(TABLE)]),
}


@pytest.mark.parametrize("case", REPEATED)
def test_a_row_that_is_there_twice_is_found(case):
    assert has_repeated_rows(REPEATED[case]())


SINGLE = {
    "a table": lambda: TABLE,
    "shuffled": lambda: TABLE.shuffle(seed=1),
    "split": lambda: TABLE.train_test_split(0.2, seed=1)["train"],
    "joined parts": lambda: concatenate_datasets([TABLE.select(range(10)), TABLE.select(range(10, 20))]),
    "joined selections": lambda: concatenate_datasets([TABLE.select([0, 2, 4]), TABLE.select([3, 1])]),
    "equal rows written twice": lambda: Dataset.from_list([ROWS[0], ROWS[0]]),
    "joined equal tables": lambda: concatenate_datasets([Dataset.from_list(ROWS), Dataset.from_list(ROWS)]),
    "interleaved": lambda: interleave_datasets([TABLE.select(range(25)), TABLE.select(range(25, 50))]),
    "no row": lambda: TABLE.select([]),
    "a list": lambda: ROWS,
    "a list that somebody wrote": lambda: [ROWS[0], ROWS[1], ROWS[0]],
    "subset": lambda: Subset(TABLE, [2, 1]),
    "concatenated subsets": lambda: ConcatDataset([Subset(ROWS, [0, 2]), Subset(ROWS, [1, 3])]),
    "stacked, with one part repeated": lambda: StackDataset(Subset(ROWS, [0, 0]), TABLE.select([1, 2])),
    "tensors": lambda: TensorDataset(torch.zeros(3, 2)),
    "one that chooses its rows itself": lambda: Half(Subset(ROWS, [1, 1, 2, 2])),
    "numbers of rows that are none": lambda: Subset(ROWS, ["a", "b"]),
}


@pytest.mark.parametrize("case", SINGLE)
def test_rows_of_which_none_is_there_twice_are_taken(case):
    assert not has_repeated_rows(SINGLE[case]())


def test_a_file_that_is_read_twice_has_the_same_rows(reload):
    assert has_repeated_rows(concatenate_datasets([reload(), reload()]))
    assert has_repeated_rows(concatenate_datasets([reload(), reload().select([3])]))
    # Rows 7 to 10 of the file, and its row 8.
    inner = reload().select(range(5, 20)).select(range(2, 6))
    assert has_repeated_rows(concatenate_datasets([inner, reload().select(range(8, 9))]))
    assert not has_repeated_rows(concatenate_datasets([inner, reload().select(range(11, 13))]))
    assert has_repeated_rows(concatenate_datasets([reload().rename_column("labels", "label")] * 2))


def test_rows_are_found_in_any_order_at_random():
    draw = np.random.default_rng(3)
    for _ in range(50):
        first, second = (draw.choice(50, size=5, replace=False) for _ in range(2))
        expected = bool(set(first.tolist()) & set(second.tolist()))
        assert has_repeated_rows(concatenate_datasets([TABLE.select(first), TABLE.select(second)])) is expected
        assert has_repeated_rows(ConcatDataset([Subset(ROWS, first), Subset(ROWS, second)])) is expected


class Longer(torch.utils.data.Dataset):
    """Has more rows than the data set that it reads them from."""

    def __init__(self, rows, times: int) -> None:
        self.dataset = rows
        self.times = times

    def __len__(self) -> int:
        return self.times * len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[index % len(self.dataset)]


@pytest.mark.parametrize("times", [1, 2])
def test_a_wrapper_with_more_rows_than_it_reads_repeats_some(times):
    assert has_repeated_rows(Longer(TABLE, times)) is (times > 1)


class WithDemonstrations(torch.utils.data.Dataset):
    """Puts public examples before each row."""

    def __init__(self, rows, demonstrations) -> None:
        self.rows = rows
        self.demonstrations = demonstrations

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return {**self.rows[index], "before": self.demonstrations[0]}


def test_other_data_sets_that_a_wrapper_holds_repeat_nothing():
    assert not has_repeated_rows(WithDemonstrations(ROWS, TABLE.select(range(5))))


class Held(torch.utils.data.Dataset):
    """Reads each row of a data set that it holds under a name of its own."""

    def __init__(self, rows) -> None:
        self._held = rows

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int):
        return self._held[index]


def test_a_wrapper_shows_the_rows_that_it_holds_under_any_name():
    assert has_repeated_rows(ConcatDataset([Held(TABLE), Held(TABLE)]))
    assert not has_repeated_rows(ConcatDataset([Held(TABLE.select(range(5))), Held(TABLE.select(range(5, 9)))]))
