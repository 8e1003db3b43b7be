"""The data-free mask: exact in size, a function of the weights and the public seed, and obeyed by each update."""

import copy
import functools

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer
from hf_dpzo.data.sampling import SealedRows
from hf_dpzo.zo.directions import DIRECTIONS, Gaussian
from hf_dpzo.zo.mask import Mask
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.philox import CHUNK_SIZE
from hf_dpzo.zo.pruning import _FIRST_STEP, DataFreePruning

from support.models import causal_lm, classifier, with_lora
from support.rows import labelled_rows


def outputs_of(model):
    return lambda: model(torch.ones((1, 1), dtype=torch.long))[0]


def mask_of(model, ratio=0.1, seed=0, stage=0, trained=None) -> Mask:
    weights = list(model.parameters())
    trained = [p for p in weights if p.requires_grad] if trained is None else trained
    return DataFreePruning(ratio=ratio).compute_mask(outputs_of(model), weights, trained, seed=seed, stage=stage)


def dense(mask: Mask, sizes) -> torch.Tensor:
    chunks = [mask.unpack_chunk(i, c) for i, size in enumerate(sizes) for c in range(-(-size // CHUNK_SIZE))]
    return torch.from_numpy(np.concatenate(chunks)).bool()


def sizes_of(model) -> list[int]:
    return [p.numel() for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def textbook_scores(model, smoothing=1e-3) -> torch.Tensor:
    """Follow prune.py of Liu et al. with one query, on dense vectors: |theta| for theta; g1, a step along it, g2."""
    linear = copy.deepcopy(model)
    for p in linear.parameters():
        p.abs_()
    parameters = list(linear.parameters())
    sizes = [p.numel() for p in parameters]
    z = [
        torch.cat(
            [
                Gaussian(seed=0, sizes=sizes).values(index=i, step=_FIRST_STEP + s, direction=0)
                for i in range(len(sizes))
            ]
        )
        for s in (0, 1)
    ]

    def f(theta):
        torch.nn.utils.vector_to_parameters(theta, parameters)
        return outputs_of(linear)().double().sum()

    theta = torch.nn.utils.parameters_to_vector(parameters).clone()
    g1 = (f(theta + smoothing * z[0]) - f(theta - smoothing * z[0])) / 2
    moved = theta + smoothing * g1 * z[0]
    g2 = (f(moved + smoothing * z[1]) - f(moved - smoothing * z[1])) / 2
    return ((g2 * z[1] - g1 * z[0]) * theta).abs()


@pytest.mark.parametrize("make", [classifier, causal_lm])
def test_mask_keeps_the_lowest_textbook_scores(make):
    model = make().double()
    ours = dense(mask_of(model), sizes_of(model))
    scores = textbook_scores(model)
    keep = int(0.1 * len(scores))
    theirs = torch.zeros(len(scores), dtype=torch.bool)
    theirs[scores.argsort()[:keep]] = True
    assert (ours == theirs).float().mean() > 0.999


@pytest.mark.parametrize("ratio", [0.01, 0.4, 1.0])
@pytest.mark.parametrize("lora", [False, True])
def test_mask_keeps_exactly_its_share_of_coordinates(ratio, lora):
    """This holds even where half of the scores are equal: the B matrices of a new adapter are zero."""
    model = with_lora(classifier()) if lora else classifier()
    mask = mask_of(model, ratio)
    assert mask.count == max(1, int(ratio * sum(sizes_of(model)))) == int(dense(mask, sizes_of(model)).sum())


def test_weights_are_restored_to_the_last_bit():
    model = classifier()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = -0.0
    before = [p.detach().clone() for p in model.parameters()]
    mask_of(model)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.view(torch.int32), new.detach().view(torch.int32))


def test_weights_are_restored_after_an_error():
    model = classifier()
    before = [p.detach().clone() for p in model.parameters()]

    def broken() -> torch.Tensor:
        raise KeyboardInterrupt

    weights = list(model.parameters())
    with pytest.raises(KeyboardInterrupt):
        DataFreePruning(ratio=0.1).compute_mask(broken, weights, weights, seed=0, stage=0)
    assert all(torch.equal(old, new.detach()) for old, new in zip(before, model.parameters(), strict=True))


def test_outputs_that_overflow_are_refused():
    model = classifier()
    weights = list(model.parameters())
    with pytest.raises(ValueError, match="pruning: the model's outputs overflow"):
        DataFreePruning(ratio=0.1).compute_mask(lambda: torch.tensor(torch.inf), weights, weights, seed=0, stage=0)


def test_mask_is_a_function_of_weights_seed_and_stage():
    model = classifier()
    sizes = sizes_of(model)
    assert torch.equal(dense(mask_of(model), sizes), dense(mask_of(model), sizes))
    assert not torch.equal(dense(mask_of(model), sizes), dense(mask_of(model, seed=1), sizes))
    assert not torch.equal(dense(mask_of(model), sizes), dense(mask_of(model, stage=1), sizes))


@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_a_masked_direction_is_the_rescaled_direction_within_the_mask(kind):
    sizes = [CHUNK_SIZE + 70, 9]
    draw = np.random.default_rng(0)
    selected = [draw.random(size) < 0.3 for size in sizes]
    mask = Mask(selected)
    whole, masked = (DIRECTIONS[kind](seed=0, sizes=sizes, mask=one) for one in (None, mask))
    z, m = (torch.cat([one.values(index=i, step=2, direction=1) for i in (0, 1)]) for one in (whole, masked))
    chosen = torch.from_numpy(np.concatenate(selected))
    assert torch.equal(dense(mask, sizes), chosen)
    assert (m[~chosen] == 0).all()
    stretch = m[chosen] / z[chosen]
    assert stretch.std() < 1e-6
    if kind != "gaussian":
        assert float(m.double().square().sum()) == pytest.approx(mask.count, rel=1e-5)


@pytest.mark.parametrize("update", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("lora", [False, True])
def test_masked_out_coordinates_never_move(kind, update, lora, make_args, tokenizer):
    """The published code moves none at all: its masked updates edit copies. Here the other coordinates do move."""
    base = classifier()
    args = make_args(
        method="zopo", mask=kind, update=update, pruning_ratio=0.1, num_stages=2, max_steps=6, weight_decay=0.1,
        anchor_strength=0.5,
    )  # fmt: skip
    trainer = ZOTrainer(
        model=with_lora(base) if lora else base,
        args=args,
        train_dataset=labelled_rows(40),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    masks, states = [], []

    class Watched(ZOOptimizer):
        def step(self, closure=None) -> None:
            masks.append(dense(self.directions.mask, [p.numel() for p in self.parameters()]))
            before = torch.cat([p.detach().flatten() for p in self.parameters()])
            super().step()
            states.append((before, torch.cat([p.detach().flatten() for p in self.parameters()])))

    trainer.optimizer_cls_and_kwargs = (Watched, trainer.optimizer_cls_and_kwargs[1])
    trainer.train()
    for mask, (before, after) in zip(masks, states, strict=True):
        assert torch.equal(before[~mask], after[~mask])
        assert (before[mask] != after[mask]).float().mean() > 0.9
    assert all(torch.equal(masks[0], mask) for mask in masks[:2])
    assert all(torch.equal(masks[-1], mask) for mask in masks[2:])
    assert torch.equal(masks[0], masks[-1]) == (kind == "static")


def test_a_model_that_pruning_cannot_run_is_refused_before_data_are_touched(make_args, tokenizer, monkeypatch):
    model, fetched = classifier(), []
    trainer = ZOTrainer(
        model=model,
        args=make_args(method="zopo", num_stages=2),
        train_dataset=labelled_rows(40),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    forward = model.forward

    @functools.wraps(forward)
    def forward_of_batches_only(*given, **named):
        return forward(*given, **named) if named else 1 / 0

    monkeypatch.setattr(model, "forward", forward_of_batches_only)
    monkeypatch.setattr(SealedRows, "__getitems__", lambda rows, drawn: fetched.append(drawn))
    with pytest.raises(ValueError, match=r"pruning: the model can not be run on one token \(ZeroDivisionError\)"):
        trainer.train()
    assert not fetched
