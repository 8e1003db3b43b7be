"""The probe with rows of several texts, and with rows whose neighbours fail on what is not a number."""

import pytest
import torch

from hf_dpzo.data.collation import LogicalBatchCollator, get_row_signature
from hf_dpzo.data.filler import stretch_row
from hf_dpzo.data.sampling import FetchedRow
from hf_dpzo.isolation.neighbors import repeat_tokens
from hf_dpzo.isolation.probe import CoupledRowsError, probe_isolation
from hf_dpzo.isolation.trace import locate_row
from hf_dpzo.losses import OwnLoss
from hf_dpzo.losses.heads import build_head_loss

from support.heads import CASES


RAGGED = [{"input_ids": [[5, 6], [7, 8, 9]]}, {"input_ids": [[4, 5, 6], [7, 8, 4]]}]


def probe(case, loss, rows):
    model = case.model()
    return probe_isolation(model, lambda rows: loss(model)(model, case.collate(rows)), rows)


def test_rows_of_several_texts_are_probed():
    case = CASES["choices"]
    assert probe(case, build_head_loss, case.rows(5)).loss_change < 1e-5


def test_a_loss_that_joins_rows_of_several_texts_is_found():
    case = CASES["choices"]

    def joined(model):
        own = build_head_loss(model)
        return lambda model, inputs: own(model, inputs) + own.scores(model, inputs).mean()

    with pytest.raises(CoupledRowsError, match="so per_example_loss joins rows"):
        probe(case, joined, case.rows(5))


@pytest.mark.parametrize("flat", [False, True])
def test_the_longest_text_of_a_row_is_found_in_a_batch(flat):
    batch = torch.tensor([[[4, 5, 6], [7, 8, 4]], [[5, 6, 0], [7, 8, 9]]])
    found = locate_row(batch.flatten(0, 1) if flat else batch, RAGGED[0])
    assert (found.index, found.batch, found.start, found.length, found.width) == (1, 2, 0, 3, 3)
    assert locate_row(batch[:1], RAGGED[0]) is None


def test_the_end_of_a_text_stays_where_it_is():
    row = {"input_ids": torch.tensor([5, 6, 3])}
    repeated = list(repeat_tokens(row, [{"input_ids": torch.tensor([3, 9, 3])}], kept=[3]))
    assert [copy["input_ids"].tolist() for copy in repeated] == [[5, 5, 3], [6, 6, 3], [9, 9, 3]]


@pytest.mark.parametrize("name", ["classes by bart", "classes by t5", "t5", "segments", "words of sounds"])
def test_other_heads_are_probed(name):
    case = CASES[name]
    assert probe(case, build_head_loss, case.rows(5)).loss_change < 1e-5


def test_a_batch_that_fails_on_nan_is_no_reason_to_refuse():
    case = CASES["segments"]

    class Strict(OwnLoss):
        def __call__(self, model, inputs):
            assert inputs["pixel_values"].isfinite().all()
            return super().__call__(model, inputs)

    assert probe(case, Strict, case.rows(5)).loss_change < 1e-5


# ---- How such rows become micro-batches ----


def test_rows_of_differing_numbers_of_choices_are_never_collated_together():
    """The stock collator takes the number from one row, and drops what others have more."""
    two, three = {"input_ids": [[5], [6]]}, {"input_ids": [[5], [6], [7]]}
    assert get_row_signature(two) != get_row_signature(three)
    assert get_row_signature({"x": torch.ones(2, 3).long()}) != get_row_signature({"x": torch.ones(3, 3).long()})
    assert get_row_signature({"x": torch.ones(2, 3)}) == get_row_signature({"x": torch.ones(3, 3)})
    seen = []
    collator = LogicalBatchCollator(collate=lambda rows: seen.append(rows) or {}, micro_batch_size=8)
    collator([FetchedRow(unit=i, row=row, slot=i) for i, row in enumerate([two, three, two, three])])
    assert sorted(len({len(row["input_ids"]) for row in rows}) for rows in seen) == [1, 1]


def test_a_stretched_row_has_as_many_ends_as_before():
    row = {"input_ids": [5, 6, 3], "attention_mask": [1, 1, 1], "labels": [7, 3], "class": 1}
    stretched = stretch_row(row, 6, written_fields=["labels"])
    assert stretched["input_ids"].count(3) == stretched["labels"].count(3) == 1
    assert [len(stretched[name]) for name in ("input_ids", "attention_mask", "labels")] == [6, 6, 6]
    assert stretch_row({"input_ids": [[5, 3], [6, 7, 3]]}, 4) == {"input_ids": [[5, 5, 5, 3], [6, 6, 7, 3]]}
    assert len(stretch_row({"input_values": [0.5, 0.25]}, 4)["input_values"]) == 4


def test_a_row_whose_written_tokens_fit_no_public_length_contributes_nothing():
    collator = LogicalBatchCollator(
        collate=CASES["t5"].collator(), micro_batch_size=2, padded_lengths=(4,), written_fields=("labels",)
    )
    rows = [{"input_ids": [5, 3], "labels": labels} for labels in ([6, 7, 3], [6, 7, 8, 9, 3])]
    batch = collator([FetchedRow(unit=i, row=row, slot=i) for i, row in enumerate(rows)])["batch"]
    (only,) = batch.micro_batches
    assert [row.unit for row in only.rows] == [0]
    assert only.inputs["labels"].shape == only.inputs["input_ids"].shape == (2, 4)
