"""What is kept of rows from step to step is computed once, from a row alone, and gives the losses of whole rows."""

import functools
import os
import shutil
import types

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from hf_dpzo.data.sampling import batch_capacity
from hf_dpzo.frozen import rows as rows_module
from hf_dpzo.frozen.digest import digest_row
from hf_dpzo.frozen.prefix import compute_prefix
from hf_dpzo.frozen.store import FrozenCache, RowStore, find_folder
from hf_dpzo.isolation.probe import Isolation
from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.losses.prompting import LabelStringLoss, NextWordLoss
from hf_dpzo.step.batch_losses import BatchLosses
from hf_dpzo.step.sharing import find_shared_work
from hf_dpzo.trainer import checking
from hf_dpzo.trainer.caching import build_frozen_cache

from support.activated import INVOCATION, activated_losses, activated_model, activated_rows, train_activated
from support.models import causal_lm, classifier, with_lora, word_tokenizer
from support.runs import short_args, train
from support.stacks import find_layers


CPU = torch.device("cpu")


def test_an_entry_is_read_as_it_was_put():
    store = RowStore(torch.empty(1 << 12, dtype=torch.uint8))
    first = [torch.randn(3, 5), torch.arange(7), torch.randn(2).bfloat16(), torch.zeros(0)]
    store.put(b"a", first)
    store.put(b"b", [torch.ones(4)])
    assert all(map(torch.equal, store.get(b"a", CPU), first)) and store.get(b"b", CPU)[0].tolist() == [1] * 4


def test_an_entry_without_room_is_not_kept():
    store = RowStore(torch.empty(128, dtype=torch.uint8))
    store.put(b"a", [torch.ones(17)])
    store.put(b"b", [torch.ones(17)])
    store.put(b"c", [torch.ones(1), torch.ones(1)])
    assert [store.get(key, CPU) is None for key in (b"a", b"b", b"c")] == [False, True, True]


def cache(place, folder, **changes) -> FrozenCache:
    settings = {"dtype": None, "most_rows": 24, "longest_row": 64, "folder": folder}
    return FrozenCache(place=place, **{**settings, **changes})


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_store_leaves_no_file_and_has_room_for_all_rows(place, tmp_path):
    store = cache(place, tmp_path).open_store(100.0)
    for number in range(24):
        store.put(bytes([number]), [torch.full((1600,), float(number))])
    assert all(store.get(bytes([number]), CPU)[0][5] == number for number in range(24))
    assert not os.listdir(tmp_path)


def test_too_little_room_is_said_by_public_numbers(tmp_path):
    with pytest.warns(UserWarning, match=r"^frozen_cache=disk: up to 1\d{6,}\.\d GiB would be kept, and half of what"):
        RowStore.open("disk", nbytes=1 << 54, folder=tmp_path)


def test_a_disk_that_others_fill_ends_no_run(tmp_path, monkeypatch):
    """The system would end a process that wrote to memory behind which there is no disk."""
    store = RowStore.open("disk", nbytes=1 << 25, folder=tmp_path)
    store.put(b"a", [torch.ones(4)])

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    store.put(b"b", [torch.ones(4)])
    store.put(b"c", [torch.ones(1 << 22)])
    assert [store.get(key, CPU) is None for key in (b"a", b"b", b"c")] == [False, False, True]


def test_several_processes_share_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1 << 20))
    with pytest.warns(UserWarning, match="^frozen_cache=disk: "):
        store = cache("disk", tmp_path, processes=4, most_rows=10**6).open_store(100.0)
    assert len(store._buffer) == 1 << 17


def test_a_folder_that_takes_no_file_is_named_and_that_of_the_rows_is_passed_by(tmp_path):
    with pytest.raises(ValueError, match=r"^frozen_cache=disk: no file can be made in \S*/gone \(No such file"):
        cache("disk", tmp_path / "gone").open_store(100.0)
    rows = types.SimpleNamespace(cache_files=[{"filename": str(tmp_path / "gone" / "rows.arrow")}])
    assert find_folder(rows, tmp_path) == tmp_path


def test_a_model_that_is_evaluated_as_a_whole_keeps_nothing_and_says_so(tmp_path):
    model = torch.compile(causal_lm(), backend="eager")
    with pytest.raises(ValueError, match=r"^frozen_cache=disk: a model that is compiled, or split over processes, is"):
        find_shared_work(model, losses_of(causal_lm()), [], cache("disk", tmp_path))


def test_no_choice_is_none(make_args):
    args = make_args(frozen_cache=None, frozen_cache_dtype=None)
    assert build_frozen_cache(args, causal_lm(), [], num_rows=0, longest_row=8, most_drawn=8) is None
    args = make_args(frozen_cache="memory", frozen_cache_dtype=None)
    assert build_frozen_cache(args, causal_lm(), [], num_rows=0, longest_row=8, most_drawn=8).dtype is None


def test_there_is_room_for_no_more_rows_than_all_steps_draw(tmp_path, monkeypatch):
    """Nobody is warned of memory for rows that no step comes to."""
    opened = []
    monkeypatch.setattr(checking, "build_frozen_cache", lambda *args, **known: opened.append(known) or None)
    for steps in (1, 4):
        train(tmp_path / str(steps), max_steps=steps, expected_batch_size=2, frozen_cache="memory")
    one, four = (known["most_drawn"] for known in opened)
    assert one == batch_capacity(2) and four == batch_capacity(8)
    build = functools.partial(build_frozen_cache, short_args(tmp_path, frozen_cache="memory"), causal_lm(), [])
    assert [build(**opened[0] | {"num_rows": count}).most_rows for count in (999, 9)] == [one, 9]


def test_no_message_follows_from_how_many_rows_users_have(tmp_path, monkeypatch):
    """Warnings are errors: with the rows of users, none may say, or show by coming, how much would be kept."""
    opened = []
    monkeypatch.setattr(RowStore, "open", classmethod(lambda kind, place, **sizes: opened.append(sizes["nbytes"])))
    users = [
        {"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": n % 2, "user": f"u{n // 2}"} for n in range(16)
    ]
    for changes in ({}, {"privacy_unit_column": "user", "max_rows_per_unit": 2}):
        model = with_lora(classifier(num_hidden_layers=2))
        find_layers(model)[0].requires_grad_(False)
        settings = {
            "rows": Dataset.from_list(users),
            "max_steps": 1,
            "expected_batch_size": 2,
            "frozen_cache": "memory",
        }
        train(tmp_path / str(len(opened)), model=model, **settings, **changes)
    assert opened[0] > 0 and opened[1] is None
    assert cache("memory", tmp_path, most_rows=None).open_store(100.0) is None and opened[2] is None


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_rows_whose_number_is_not_public_have_half_of_what_is_free(place, tmp_path):
    store = cache(place, tmp_path, most_rows=None).open_store(100.0)
    store.put(b"row", [torch.full((1 << 16,), 5.0)])
    assert store.get(b"row", torch.device("cpu"))[0].sum() == 5 << 16


def losses_of(model, **changes) -> BatchLosses:
    return activated_losses(model, CausalLMLoss(model), **changes)


def shared_losses(model, tmp_path, rows, *, rows_per_step: int = 0, **changes) -> BatchLosses:
    losses = losses_of(model, **changes)
    kept = cache("memory", tmp_path, rows_per_step=rows_per_step)
    return BatchLosses(**{**vars(losses), "shared": find_shared_work(model, losses, [rows], kept)})


@pytest.mark.parametrize("padded_lengths", [(), (16,)])
@torch.no_grad()
def test_a_row_seen_before_runs_only_what_moves(padded_lengths, tmp_path):
    torch.manual_seed(0)
    model = activated_model(causal_lm(num_hidden_layers=4), layers_to_transform=[2, 3]).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    rows = activated_rows(9).to_list()
    fast = shared_losses(model, tmp_path, rows, padded_lengths=padded_lengths)
    computed = {}
    for number, layer in enumerate(find_layers(model.get_base_model())):
        layer.mlp.register_forward_hook(lambda *_, n=number: computed.update({n: computed.get(n, 0) + 1}))

    def evaluate(chosen) -> torch.Tensor:
        computed.clear()
        batch = fast.build_public_batch(chosen)
        with fast.shared.opened(batch.micro_batches):
            found = fast(model, batch)
        return found[torch.tensor(batch.row_units).argsort()]

    first = evaluate(rows)
    assert computed[0] > 0
    again = evaluate(rows[::-1]).flip(0)
    assert 0 not in computed and 1 not in computed and computed[3] > 0
    torch.testing.assert_close(again, losses_of(model).of_public(model, rows), rtol=1e-5, atol=0)
    if padded_lengths:
        assert torch.equal(first, again)
    else:
        torch.testing.assert_close(first, again, rtol=1e-6, atol=0)
    evaluate([rows[0], {**rows[1], "input_ids": [*rows[1]["input_ids"][:-1], 9]}])
    assert computed[0] > 0, "another row is computed"


@torch.no_grad()
def test_what_is_kept_of_a_row_does_not_depend_on_its_neighbours(tmp_path):
    torch.manual_seed(0)
    model = activated_model(causal_lm(num_hidden_layers=2), layers_to_transform=[1]).eval()
    rows = activated_rows(9).to_list()
    kept = []
    for others in ([], rows[1:2], rows[1:]):
        fast = shared_losses(model, tmp_path, rows)
        batch = fast.build_public_batch([rows[0], *others])
        with fast.shared.opened(batch.micro_batches):
            fast(model, batch)
        alone = fast.build_public_batch(rows[:1]).micro_batches[0]
        kept.append(fast.shared.rows.store.get(digest_row(rows[0], alone.inputs, 0), CPU))
    for other in kept[1:]:
        assert len(other) == len(kept[0]) == 2 and all(map(torch.equal, kept[0], other))


def count_prefixes(monkeypatch) -> list[int]:
    """Take down for each pass over prefixes how many rows it has."""
    passes = []

    def compute(model, inputs):
        passes.append(len(inputs["input_ids"]))
        return compute_prefix(model, inputs)

    monkeypatch.setattr(rows_module, "compute_prefix", compute)
    return passes


@torch.no_grad()
def test_rows_that_public_shapes_keep_apart_are_read_together(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = activated_model(causal_lm(num_hidden_layers=2), layers_to_transform=[1]).eval()
    rows = activated_rows(9).to_list()
    passes = count_prefixes(monkeypatch)

    def keep(fast, drawn) -> list[list[torch.Tensor]]:
        passes.clear()
        batch = fast.build_public_batch(drawn)
        with fast.shared.opened(batch.micro_batches):
            fast(model, batch)
        return [find_kept(fast, row) for row in drawn]

    together = {"padded_lengths": (16,), "rows_per_step": 16}
    fast = shared_losses(model, tmp_path, rows, **together)
    (first,) = keep(fast, rows[:1])
    assert passes == [4]
    first_again, *others = keep(fast, [rows[0], *rows[:0:-1]])
    assert passes == [4] * 3, "the eight rows that are new, three beside a row that fills the shape"
    keep(fast, rows)
    assert not passes
    alone = [keep(shared_losses(model, tmp_path, rows, **together), [row])[0] for row in rows[:0:-1]]
    for one, other in zip([first, *alone], [first_again, *others], strict=True):
        assert len(one) == len(other) == 2 and all(map(torch.equal, one, other))


@torch.no_grad()
def test_rows_for_which_there_is_no_room_are_not_read_ahead_again(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = activated_model(causal_lm(num_hidden_layers=2), layers_to_transform=[1]).eval()
    rows = activated_rows(9).to_list()
    fast = shared_losses(model, tmp_path, rows, padded_lengths=(16,), rows_per_step=16)
    fast.shared.rows.store = RowStore(torch.empty(0, dtype=torch.uint8))
    passes = count_prefixes(monkeypatch)
    counts = []
    for _ in range(3):
        passes.clear()
        batch = fast.build_public_batch(rows)
        with fast.shared.opened(batch.micro_batches):
            fast(model, batch)
        counts.append(len(passes))
    assert counts == [6, 3, 3]


def find_kept(losses: BatchLosses, row: dict) -> list[torch.Tensor]:
    alone = losses.build_public_batch([row]).micro_batches[0]
    return losses.shared.rows.store.get(digest_row(row, alone.inputs, 0), CPU)


@torch.no_grad()
def test_rows_with_targets_before_the_invocation_change_nothing_that_is_kept_of_others(tmp_path):
    """They are read as a whole, in a call that is stopped on the way, and PEFT leaves hooks behind it."""
    torch.manual_seed(0)
    model = activated_model(causal_lm(num_hidden_layers=4), layers_to_transform=[1, 2, 3]).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    rows = activated_rows(6).to_list()
    talk = [5, *INVOCATION, 6]  # Shorter than the others, so that it is read before them.
    talks = [{"input_ids": [*talk, end], "attention_mask": [1] * 5, "labels": [*talk, end]} for end in range(7, 11)]
    together = {"padded_lengths": (16,), "rows_per_step": 16}
    kept = []
    for chosen in (rows, [*talks, *rows]):
        fast = shared_losses(model, tmp_path, rows, **together)
        batch = fast.build_public_batch(chosen)
        with fast.shared.opened(batch.micro_batches):
            fast(model, batch)
        kept += [[find_kept(fast, row) for row in rows]]
    for one, other in zip(*kept, strict=True):
        assert len(one) == len(other) == 2 and all(map(torch.equal, one, other))


@torch.no_grad()
def test_a_row_that_fails_while_rows_are_read_together_takes_no_other_along(tmp_path):
    torch.manual_seed(0)
    model = activated_model(causal_lm(num_hidden_layers=2), layers_to_transform=[1]).eval()
    rows = activated_rows(9).to_list()
    fast = shared_losses(model, tmp_path, rows, padded_lengths=(16,), rows_per_step=16)
    expected = fast.of_public(model, rows)
    first = rows[3]["input_ids"][0]

    def fail(module, args):
        if (args[0] == first).any():
            raise RuntimeError("of one row")

    hook = model.get_input_embeddings().register_forward_pre_hook(fail)
    batch = fast.build_public_batch(rows)
    with fast.shared.opened(batch.micro_batches):
        found = fast(model, batch)[torch.tensor(batch.row_units).argsort()]
    hook.remove()
    failed = torch.tensor([first in row["input_ids"] for row in rows])
    assert failed.any() and not failed.all()
    assert torch.equal(found.isnan(), failed) and torch.equal(found[~failed], expected[~failed])


def test_rows_that_move_each_others_bits_or_fill_few_shapes_are_read_alone(tmp_path, monkeypatch):
    passes = count_prefixes(monkeypatch)
    rows, settings = activated_rows(9), {"expected_batch_size": "all", "max_steps": 2, "frozen_cache": "memory"}
    for change, batch, size in ((0.0, 2, 2), (1e-7, 2, 1), (0.0, 4, 1)):  # Of four rows, nine fill no four shapes.
        monkeypatch.setattr(
            checking, "measure_isolation", lambda *_, change=change, **__: Isolation(loss_change=change)
        )
        passes.clear()
        train_activated(tmp_path / f"{size}_{batch}", rows=rows, per_device_train_batch_size=batch, **settings)
        assert set(passes[-2:]) == {size}


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (lambda model: NextWordLoss(words=[5, 6], model=model), [(1, 2, 2, 6, 8), (4, 16)]),
        (lambda model: LabelStringLoss(strings=[[5, 7], [6]], model=model), [(4, 2, 2, 6, 8)]),
    ],
    ids=["one pass", "several passes with other tokens"],
)
@torch.no_grad()
def test_keys_of_layers_that_never_run_again_are_not_kept(build, shapes, tmp_path):
    torch.manual_seed(0)
    model = activated_model(causal_lm(num_hidden_layers=4), layers_to_transform=[3]).eval()
    rows = [{**row, "labels": number % 2} for number, row in enumerate(activated_rows(9).to_list())]
    losses = activated_losses(model, build(model), collate=DataCollatorWithPadding(word_tokenizer()))
    shared = find_shared_work(model, losses, [rows], cache("memory", tmp_path))
    fast = BatchLosses(**{**vars(losses), "shared": shared})
    torch.testing.assert_close(fast.of_public(model, rows), losses.of_public(model, rows), rtol=1e-5, atol=0)
    ids = [7] * 6 + rows[0]["input_ids"][-4:]
    row = {"input_ids": ids, "attention_mask": [1] * 10, "labels": 0}
    batch = fast.build_public_batch([row])
    with shared.opened(batch.micro_batches):
        fast(model, batch)
    kept = shared.rows.store.get(digest_row(row, batch.micro_batches[0].inputs, 0), CPU)
    assert [tuple(tensor.shape) for tensor in kept] == shapes


@torch.no_grad()
def test_public_rows_of_the_probe_are_not_kept(tmp_path):
    """A probe makes embeddings NaN while it evaluates rows, and these rows may be training rows too."""
    torch.manual_seed(0)
    model = activated_model().eval()
    rows = activated_rows(9).to_list()
    fast = shared_losses(model, tmp_path, rows)
    poison = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * torch.nan)
    assert fast.of_public(model, rows).isnan().all()
    poison.remove()
    batch = fast.build_public_batch(rows)
    with fast.shared.opened(batch.micro_batches):
        assert fast(model, batch).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [{}, {"frozen_cache": "disk", "padded_lengths": None}, {"points_per_pass": 2}, {"frozen_cache_dtype": "bfloat16"}],
    ids=str,
)
def test_a_run_that_keeps_rows_releases_what_one_that_does_not_does(changes, tmp_path, sums, monkeypatch):
    def run(name: str, **changes) -> list[list[int]]:
        sums.clear()
        torch.manual_seed(0)
        model = with_lora(classifier(num_hidden_layers=2))
        for parameter in find_layers(model)[0].parameters():
            parameter.requires_grad_(False)
        train(tmp_path / name, model=model, **{"method": "aggzo", "num_directions": 2, "clip_norm": 10.0, **changes})
        return sums.copy()

    kept = run("kept", **{"frozen_cache": "memory", **changes})
    monkeypatch.setattr(checking, "find_shared_work", lambda *_, **__: None)
    whole = run("whole", padded_lengths=changes.get("padded_lengths", [16]))
    rounding = 2**40 * (0.2 if "frozen_cache_dtype" in changes else 1e-3)
    for one, other in zip(kept, whole, strict=True):
        assert all(abs(a - b) < rounding for a, b in zip(one, other, strict=True))
    assert max(abs(value) for one in whole for value in one) > 2**40 * 0.1


@torch.no_grad()
def test_a_further_call_does_not_run_on_keys_that_were_not_kept(tmp_path):
    """On public rows this loss calls the model once, so that nothing else would tell."""
    torch.manual_seed(0)
    model = activated_model(causal_lm(num_hidden_layers=4), layers_to_transform=[3]).eval()

    class AgainForSome(CausalLMLoss):
        again = False

        def __call__(self, model, inputs):
            first = super().__call__(model, inputs)
            return super().__call__(model, inputs) if self.again else first

    rows = activated_rows(9).to_list()
    loss = AgainForSome(model)
    losses = activated_losses(model, loss)
    fast = BatchLosses(**{**vars(losses), "shared": find_shared_work(model, losses, [rows], cache("memory", tmp_path))})
    assert fast.of_public(model, rows).isfinite().all()
    loss.again = True
    with pytest.raises(ValueError, match=r"^frozen_cache: the loss calls the model once more"):
        fast.of_public(model, rows)
    assert fast(model, fast.build_public_batch(rows)).isnan().all()
