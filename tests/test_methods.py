"""Each method against its textbook twin, written from the paper's equations with dense vectors, through the Trainer."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from conftest import classifier, labelled_rows, with_lora
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer
from hf_dpzo.methods import METHODS, PrivateMethod
from hf_dpzo.methods.method import parameters_of
from hf_dpzo.noise import BernoulliMask, DiscreteGaussian
from hf_dpzo.perturbation import DIRECTIONS


STEPS, ROWS, EXPECTED, SMOOTHING, CLIP, RATE = 3, 40, 8, 1e-2, 0.2, 0.05


class Frozen:
    """The batches and the noise of a run, decided beforehand."""

    def __init__(self, monkeypatch, directions):
        draw = np.random.default_rng(0)
        self.masks = [draw.random(ROWS) < EXPECTED / ROWS for _ in range(STEPS + 1)]
        self.masks[1][:] = False  # An empty batch, too.
        self.noise = [[int(x) for x in draw.normal(size=directions) * 2**40] for _ in range(STEPS)]
        masks, noise = iter(self.masks * 100), iter(self.noise)
        monkeypatch.setattr(BernoulliMask, "draw", lambda mask: next(masks))
        monkeypatch.setattr(
            DiscreteGaussian, "add", lambda one, values: [a + b for a, b in zip(values, next(noise), strict=True)]
        )


def flat(parameters) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def set_flat(parameters, vector) -> None:
    with torch.no_grad():
        for p, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))


def in_order_of_the_optimizer(trainer, model) -> list[torch.Tensor]:
    """The trainable parameters of `model`, in the order in which `trainer` numbers them."""
    decayed = set(trainer.get_decay_parameter_names(model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for name, p in named if name in decayed] + [p for name, p in named if name not in decayed]


@torch.no_grad()
def losses_at(model, parameters, theta, rows, collate) -> torch.Tensor:
    """One loss for each row, evaluated one row at a time."""
    set_flat(parameters, theta)
    losses = []
    for row in rows:
        inputs = collate([row])
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        losses.append(torch.nn.functional.cross_entropy(logits, inputs["labels"]))
    return torch.stack(losses).double() if losses else torch.zeros(0, dtype=torch.float64)


def textbook_dpzero(theta, u, f, rows, noise, lam, clip, batch, alpha):
    """Zhang et al. 2024, alg. 2: x <- x - alpha (mean_i clip_C((f_i(x + lam u) - f_i(x - lam u)) / 2 lam) + z) u."""
    u = u[0]
    differences = (f(theta + lam * u, rows) - f(theta - lam * u, rows)) / (2 * lam)
    clipped = differences.clamp(-clip, clip)
    return theta - alpha * ((clipped.sum() + noise[0]) / batch * u.double()).float()


def textbook_aggzo(theta, u, f, rows, noise, phi, clip, batch, eta):
    """Bao et al. 2025, algorithm 1 with equation 21: D_agg = (D_1, ..., D_K) / K, scaled by c / max(c, |D_agg|)."""
    columns = [(f(theta + phi * z, rows) - f(theta - phi * z, rows)) / (2 * phi) for z in u]
    aggregated = torch.stack(columns, dim=1) / len(u)
    scaled = aggregated * (clip / aggregated.norm(dim=1, keepdim=True).clamp(min=clip))
    gradient = sum((scaled[:, k].sum() + noise[k]) * u[k].double() for k in range(len(u)))
    return theta - (eta / batch * gradient).float()


def textbook_mezo(theta, u, f, rows, noise, eps, clip, batch, lr):
    """Malladi et al. 2023, definition 1: the mean over the batch and over K directions."""
    if not rows:
        return theta
    gradient = sum((f(theta + eps * z, rows) - f(theta - eps * z, rows)).mean() / (2 * eps) * z.double() for z in u)
    return theta - (lr / len(u) * gradient).float()


TEXTBOOK = {"dpzero": (textbook_dpzero, 1), "aggzo": (textbook_aggzo, 4), "mezo": (textbook_mezo, 3)}


@pytest.mark.parametrize("kind", sorted(DIRECTIONS))
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", sorted(TEXTBOOK))
def test_run_agrees_with_the_textbook(method, lora, kind, tokenizer, make_args, monkeypatch):
    step, directions = TEXTBOOK[method]
    frozen = Frozen(monkeypatch, directions)
    base = classifier()
    model = with_lora(base) if lora else base
    twin = copy.deepcopy(model)
    rows, collate = labelled_rows(ROWS), DataCollatorWithPadding(tokenizer)
    private = {"noise_multiplier": 1.0, "clip_norm": CLIP} if issubclass(METHODS[method], PrivateMethod) else {}
    args = make_args(
        method=method,
        noise_multiplier=private.get("noise_multiplier", "absent"),
        clip_norm=private.get("clip_norm", "absent"),
        target_delta=1e-4 if private else "absent",
        num_directions="absent" if method == "dpzero" else directions,
        directions=kind,
        max_steps=STEPS,
        learning_rate=RATE,
        smoothing=SMOOTHING,
        lr_scheduler_type="constant",
    )
    trainer = ZOTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.train()

    parameters = in_order_of_the_optimizer(trainer, twin)
    theta = flat(parameters)
    numbered = DIRECTIONS[kind](seed=args.seed, sizes=[p.numel() for p in parameters])
    for t in range(STEPS):
        u = [
            torch.cat([numbered.values(index=i, step=t, direction=k) for i in range(len(parameters))])
            for k in range(directions)
        ]
        batch = [rows[int(i)] for i in np.flatnonzero(frozen.masks[t])]
        noise = [integer * CLIP / 2**40 for integer in frozen.noise[t]]
        evaluate = lambda at, some: losses_at(twin, parameters, at, some, collate)  # noqa: E731
        theta = step(theta, u, evaluate, batch, noise, SMOOTHING, CLIP, EXPECTED, RATE)
    reached = flat(in_order_of_the_optimizer(trainer, trainer.model))
    torch.testing.assert_close(reached, theta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_method_says_where_it_is_from(method):
    assert all(dataclasses.asdict(method.paper).values())
    assert method.__doc__ and "Args:" in method.__doc__
    assert all(f"{name}:" in method.__doc__ for name in parameters_of(method))


def test_one_direction_of_aggzo_is_dpzero():
    shared = {"noise_multiplier": 1.0, "expected_batch_size": 8, "smoothing": 0.1, "clip_norm": 2.0}
    one, other = METHODS["aggzo"](**shared, num_directions=1), METHODS["dpzero"](**shared)
    assert one.estimator == other.estimator
    assert one.mechanism == other.mechanism


def test_privacy_cost_does_not_depend_on_the_number_of_directions():
    queries = {
        METHODS["aggzo"](noise_multiplier=1.0, expected_batch_size=8, num_directions=k).mechanism.query(0.1)
        for k in (1, 16, 64)
    }
    assert len(queries) == 1
