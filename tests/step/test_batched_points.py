"""Several probe points in one forward pass: their losses are those of one after the other, and rows stay separate."""

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import DataCollatorWithPadding

from hf_dpzo import Trajectory, ZOTrainer
from hf_dpzo.losses.heads import build_head_loss
from hf_dpzo.losses.prompting import MaskedWordLoss, NextWordLoss
from hf_dpzo.step.batched_points import BatchedPointsLoss
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.spsa import DIFFERENCES
from hf_dpzo.zo.walk import CopyingWalk, ProbePoint, StackingWalk, stack

from support.models import causal_lm, classifier, masked_lm, one_layer, with_lora
from support.rows import few_public_rows, labelled_rows
from support.walks import compare_along


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """Fill the trained matrices with normal numbers, so that every point differs."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def masked():
    config = LoraConfig(r=2, target_modules=["query", "value"])
    model = get_peft_model(masked_lm(), config)
    return model, MaskedWordLoss(words=[5, 6], mask_token_id=3, model=model)


def of_head(model, task):
    model = with_lora(model, task)
    return model, build_head_loss(model)


def next_word():
    model = with_lora(causal_lm(), TaskType.CAUSAL_LM)
    return model, NextWordLoss(words=[5, 6], model=model)


LOSSES = {
    "classifier": lambda: of_head(classifier(), TaskType.SEQ_CLS),
    "language model": lambda: of_head(causal_lm(), TaskType.CAUSAL_LM),
    "next word": next_word,
    "masked word": masked,
}


def inputs_for(name: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 60, (3, 7))
    ids[:, -2] = 3
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100) if name == "language model" else torch.tensor([0, 1, 0])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
def test_a_stack_holds_the_bits_of_each_point_of_a_walk(kind):
    theta = [torch.randn(6, 5), torch.randn(11)]
    directions = DIRECTIONS[kind](seed=0, sizes=[30, 11])
    points = [ProbePoint(direction=direction, position=at) for direction, at in ((1, 0.3), (0, 0.0), (0, -0.3))]
    stacks = stack(theta, directions, step=2, points=points)
    with CopyingWalk(theta, directions, step=2, points=points) as walk:
        for stop in walk:
            assert all(torch.equal(values[stop.index], parameter) for parameter, values in stacks.items())
    assert len(stacks) == len(theta)


@pytest.mark.parametrize("name", sorted(LOSSES))
@torch.no_grad()
def test_losses_of_a_stack_equal_those_of_one_point_at_a_time(name):
    model, loss = LOSSES[name]()
    filled(model).eval()
    inputs = inputs_for(name)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    before = loss(model, inputs)
    stacks = {key: torch.stack([parameter + 0.1 * n for n in range(3)]) for key, parameter in trained.items()}
    losses = BatchedPointsLoss(loss=loss, parameters=stacks)(model, inputs)
    assert torch.equal(loss(model, inputs), before)
    for n in range(3):
        for key, parameter in trained.items():
            parameter.copy_(stacks[key][n])
        torch.testing.assert_close(losses[:, n], loss(model, inputs), rtol=1e-5, atol=1e-5)
    assert (losses[:, 0] - losses[:, 2]).abs().min() > 1e-4


@pytest.mark.parametrize("points_per_pass", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", sorted(DIFFERENCES))
def test_filling_up_the_last_pass_changes_no_coefficient(name, points_per_pass):
    theta = [torch.randn(4, dtype=torch.float64)]
    data = torch.randn(3, 4, dtype=torch.float64)
    directions = DIRECTIONS["rademacher"](seed=0, sizes=[4])
    estimator, sizes = DIFFERENCES[name](smoothing=0.1, num_directions=4), []

    losses, settings = [], {"step": 0, "points": estimator.points}
    with StackingWalk(theta, directions, **settings, points_per_stop=points_per_pass) as walk:
        for stop in walk:
            sizes.append(len(stop.points))
            losses.append(torch.sin(data @ stop.stacks[theta[0]].T))
    filled_up = estimator.coefficients(torch.cat(losses, dim=1)[:, : len(estimator.points)])
    one_by_one = compare_along(
        CopyingWalk(theta, directions, **settings), estimator, lambda: torch.sin(data @ theta[0])
    )
    torch.testing.assert_close(filled_up, one_by_one, rtol=0, atol=1e-12)
    assert set(sizes) == {points_per_pass} and len(sizes) == -(-estimator.forward_passes // points_per_pass)


def trained(make_args, tokenizer, *, loss=None, model=None, rows=24, **changes):
    torch.manual_seed(0)
    model = filled(with_lora(classifier() if model is None else model))
    args = make_args(method="aggzo", num_directions=3, expected_batch_size=rows, clip_norm=50.0, **changes)
    trainer = ZOTrainer(
        model=model,
        args=args,
        train_dataset=labelled_rows(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        per_example_loss=loss,
        probe_rows=few_public_rows(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("difference", sorted(DIFFERENCES))
def test_a_batched_run_releases_the_sums_of_a_plain_one(difference, sums, make_args, tokenizer):
    plain = trained(make_args, tokenizer, difference=difference, max_steps=1)
    batched = trained(make_args, tokenizer, difference=difference, max_steps=1, points_per_pass=4)
    one, other = (torch.tensor(each, dtype=torch.float64) / 2**40 for each in sums)
    assert one.abs().min() > 1e-4
    torch.testing.assert_close(other, one, rtol=0, atol=24 * 1e-4 / 50)  # The rounding of 24 losses over the span.
    assert batched.budget.guarantee() == plain.budget.guarantee()


def test_the_log_states_the_points_and_a_walk_over_them_keeps_the_weights(make_args, tokenizer):
    trainer = trained(make_args, tokenizer, points_per_pass=6)
    log = Trajectory.read(trainer.args.output_dir)
    assert len(log.records) == 4 and log.header["rows"]["points_per_pass"] == 6
    descent = trainer._build_descent()
    before = [parameter.detach().clone() for parameter in descent.optimizer.parameters()]
    with descent.walk(3) as walk:
        assert len(list(walk)) == 6
    assert all(
        torch.equal(parameter, two) for parameter, two in zip(before, descent.optimizer.parameters(), strict=True)
    )


@pytest.mark.parametrize(("asked", "points"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (6, 6), (64, 6)])
def test_points_are_spread_evenly_over_passes(asked, points, make_args, tokenizer):
    """Six of them: where four at once are asked for, two passes of three take less than two of four."""
    assert trained(make_args, tokenizer, max_steps=1, points_per_pass=asked)._points_per_pass == points


def test_steps_with_empty_batches_are_counted(make_args, tokenizer, monkeypatch):
    monkeypatch.setattr(
        "hf_dpzo.privacy.noise.BernoulliSampler.draw", lambda mask: torch.zeros(mask.size).bool().numpy()
    )
    assert len(trained(make_args, tokenizer, points_per_pass=6).budget.ledger) == 4


def failing(way, marked):
    def loss(model, inputs):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        losses = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
        width = min(len(marked), inputs["input_ids"].shape[1])
        hit = (inputs["input_ids"][:, :width] == torch.tensor(marked)[:width]).all(dim=1)
        if way == "raise" and hit.any():
            raise IndexError(marked)
        return torch.where(hit, torch.nan, losses)

    return loss


def test_a_failing_row_contributes_nothing_and_the_others_keep_their_part(sums, make_args, tokenizer):
    """Its whole micro-batch fails; the others are evaluated one by one, at all points at once."""
    rows = labelled_rows(24)["input_ids"]
    marked = next(ids for ids in rows if rows.count(ids) == 1)

    for way in ("raise", "nan"):
        trained(make_args, tokenizer, loss=failing(way, marked), max_steps=1, points_per_pass=6)
    one, other = (torch.tensor(each, dtype=torch.float64) / 2**40 for each in sums)
    torch.testing.assert_close(one, other, rtol=0, atol=24 * 1e-4 / 50)


def test_training_more_than_an_adapter_is_refused(make_args, tokenizer):
    with pytest.raises(ValueError, match=r"^points_per_pass=2: more than a tenth .* train an adapter\.$"):
        ZOTrainer(
            model=one_layer(),
            args=make_args(points_per_pass=2),
            train_dataset=labelled_rows(16),
            data_collator=DataCollatorWithPadding(tokenizer),
        )


def test_a_loss_that_cannot_be_batched_over_points_is_refused(make_args, tokenizer):
    def loss(model, inputs):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return torch.tensor([row.sum().item() for row in logits])

    with pytest.raises(
        ValueError, match=r"^points_per_pass=2: .* fails, or joins rows \(FailedLossError\); remove it\.$"
    ):
        trained(make_args, tokenizer, loss=loss, points_per_pass=2)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("several points", r"^points_per_pass=2: at several points at once .*, or joins rows .*; remove it\.$"),
        ("any point", r"^isolation: .*, so per_example_loss joins rows; compute each row's loss from "),
    ],
)
def test_a_loss_that_joins_rows_at_several_points_is_caught(where, message, make_args, tokenizer):
    def loss(model, inputs):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        losses = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
        joins = where == "any point" or torch._C._functorch.is_batchedtensor(logits)
        return losses + losses.mean() if joins else losses

    with pytest.raises(ValueError, match=message):
        trained(make_args, tokenizer, loss=loss, points_per_pass=2)


@pytest.mark.parametrize("points_per_pass", [0, -1, 1.5, "many"])
def test_an_invalid_number_of_points_per_pass_is_refused(points_per_pass, make_args):
    with pytest.raises(ValueError, match=f"^points_per_pass={points_per_pass}:"):
        make_args(points_per_pass=points_per_pass)
