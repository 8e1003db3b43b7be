"""What all rows begin with is computed once, and rows are read as they are read whole."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import default_collate

from hf_dpzo.data.collation import LogicalBatchCollator
from hf_dpzo.isolation.measure import build_probe_batches
from hf_dpzo.isolation.neighbors import repeat_tokens
from hf_dpzo.isolation.probe import find_kept_tokens
from hf_dpzo.models.beginning import find_common_beginning
from hf_dpzo.models.feature_classifier import FeatureClassifier

from support.feature_bases import FAMILIES
from support.models import word_tokenizer


HEAD = [5, 9, 11, 6]
TEXTS = [[*HEAD, 7 + i, 8 + 2 * i % 30, 9 + i % 5] for i in range(12)]
NAMES = {0: "bad", 1: "good"}


def build(family="llama", texts=TEXTS, **options):
    torch.manual_seed(0)
    return FeatureClassifier.on_base(
        FAMILIES[family]().eval(), word_tokenizer(), id2label=NAMES, texts=texts, **options
    )


def whole(head, ids, mask):
    """What the head reads without a beginning."""
    beginning, head.config.beginning = head.config.beginning, None
    try:
        return head.read(ids, mask)
    finally:
        head.config.beginning = beginning


@pytest.fixture(scope="module")
def head():
    return build()


def pad(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_read_as_whole_rows_are(family):
    head = build(family)
    ids, mask = pad([[*HEAD, 20, 21, 22, 23], [*HEAD, 30], [*HEAD, 8, 8]])
    torch.testing.assert_close(head.read(ids, mask), whole(head, ids, mask), atol=1e-4, rtol=1e-3)


def test_the_beginning_is_found_and_its_tokens_are_not_computed_again(head, monkeypatch):
    assert head.config.beginning == HEAD
    seen = []
    head.base.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    head.read(*pad([[*HEAD, 20, 21], [*HEAD, 22]]))
    assert seen[-1] == (2, 2)


def test_a_row_is_read_alike_to_the_bit_whatever_rows_are_beside_it(head):
    own, other = [*HEAD, 20, 21, 22], [3, 4, 20, 21, 22, 23, 24]
    for row in (own, other, HEAD):
        read = {tuple(head.read(*pad([row, beside, [1] * 7]))[0].tolist()) for beside in (own, other, HEAD, [8])}
        assert len(read) == 1


def test_rows_without_the_beginning_are_read_whole(head):
    for row in ([3, 4, 20, 21, 22], HEAD, HEAD[:2]):
        ids, mask = pad([row])
        assert head.read(ids, mask).equal(whole(head, ids, mask))


def test_padding_in_front_is_read_whole(head):
    ids, mask = torch.tensor([[0, 0, *HEAD, 20]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    assert head.read(ids, mask).equal(whole(head, ids, mask))


@pytest.mark.parametrize("options", [{"position": "mean"}, {"texts": [[5, 6, 7], [5, 8, 9]]}])
def test_nothing_begins_where_it_would_not_pay(options):
    assert build(**options).config.beginning is None


def test_a_loaded_head_reads_the_same(head, tmp_path):
    base = head.base
    base.save_pretrained(tmp_path / "base")
    head.config.base = str(tmp_path / "base")
    head.save_pretrained(tmp_path / "head")
    loaded = FeatureClassifier.from_pretrained(str(tmp_path / "head"))
    ids, mask = pad([[*HEAD, 20, 21], [*HEAD, 22]])
    assert loaded.config.beginning == HEAD
    torch.testing.assert_close(loaded.read(ids, mask), head.read(ids, mask))


def test_rows_that_are_all_equal_leave_a_token_to_read():
    assert find_common_beginning([[1, 2, 3]] * 3) == [1, 2]


@pytest.mark.parametrize("padded_lengths", [(), (6, 12)])
def test_made_up_rows_begin_as_private_ones_do_and_some_do_not(head, padded_lengths):
    """So that the probe tries both ways in which a row may be read, the common one most."""
    data = Dataset.from_dict({"input_ids": [[5]], "labels": [0]})
    collator = LogicalBatchCollator(collate=default_collate, micro_batch_size=4, padded_lengths=padded_lengths)
    columns = {"input_ids", "labels"}
    for rows in build_probe_batches(data, head, collator, kept_columns=columns, public_rows=None):
        begin = [row["input_ids"][: len(HEAD)] == HEAD and len(row["input_ids"]) > len(HEAD) for row in rows]
        assert 1 <= begin.count(False) <= 2 < begin.count(True)


def test_neighbours_of_one_token_keep_the_beginning(head):
    row = {"input_ids": [*HEAD, 20, 21], "labels": 1}
    for neighbor in repeat_tokens(row, [], kept=find_kept_tokens(head)):
        assert neighbor["input_ids"][: len(HEAD)] == HEAD
        assert neighbor["input_ids"] != row["input_ids"]
