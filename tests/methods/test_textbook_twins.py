"""Each method, run through the Trainer, agrees with its textbook twin, which is written with dense vectors.

The twins follow the papers' equations where these were at hand; those of dpzo, zoso, zopo and projected follow
methods/README.md.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer
from hf_dpzo.methods import METHODS, PrivateMethod, scaled_clip_norm
from hf_dpzo.methods.method import list_parameters
from hf_dpzo.models.unwrap import unwrap_optimizer
from hf_dpzo.privacy.noise import BernoulliSampler, DiscreteGaussian, DiscreteLaplace
from hf_dpzo.zo.directions import DIRECTIONS

from support.models import one_layer, with_lora
from support.rows import few_public_rows, labelled_rows
from support.sweeps import each_with_each


STEPS, ROWS, EXPECTED, SMOOTHING, CLIP, RATE = 3, 40, 8, 1e-2, 0.2, 0.05
LAST_SMOOTHING, ANCHOR = 5e-3, 5.0


class Frozen:
    """The batches and the noise of a run, fixed beforehand."""

    def __init__(self, monkeypatch, directions):
        draw = np.random.default_rng(0)
        self.masks = [draw.random(ROWS) < EXPECTED / ROWS for _ in range(STEPS + 1)]
        self.masks[1][:] = False  # One batch is empty.
        self.noise = [[int(x) for x in draw.normal(size=directions) * 2**40] for _ in range(STEPS)]
        masks, noise = iter(self.masks * 100), iter(self.noise)
        monkeypatch.setattr(BernoulliSampler, "draw", lambda mask: next(masks))
        for kind in (DiscreteGaussian, DiscreteLaplace):
            monkeypatch.setattr(
                kind, "add", lambda one, values: [a + b for a, b in zip(values, next(noise), strict=True)]
            )


def flat(parameters) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def set_flat(parameters, vector) -> None:
    with torch.no_grad():
        for p, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))


def in_order_of_the_optimizer(trainer, model) -> list[torch.Tensor]:
    """Return the trainable parameters of `model`, in the order in which `trainer` numbers them."""
    decayed = set(trainer.get_decay_parameter_names(model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for name, p in named if name in decayed] + [p for name, p in named if name not in decayed]


@torch.no_grad()
def losses_at(model, parameters, theta, rows, collate) -> torch.Tensor:
    """Return one loss for each row, evaluated one row at a time."""
    set_flat(parameters, theta)
    losses = []
    for row in rows:
        inputs = collate([row])
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        losses.append(torch.nn.functional.cross_entropy(logits, inputs["labels"]))
    return torch.stack(losses).double() if losses else torch.zeros(0, dtype=torch.float64)


@dataclasses.dataclass
class Setting:
    """The inputs of a textbook step: u are dense directions, f gives one loss for each row at a dense theta."""

    u: list[torch.Tensor]
    f: Callable
    rows: list
    noise: list[float]
    t: int
    memory: dict
    radius: float


def textbook_dpzero(theta, s):
    """Zhang et al. 2024, alg. 2: x <- x - alpha (mean_i clip_C((f_i(x + lam u) - f_i(x - lam u)) / 2 lam) + z) u."""
    u, lam = s.u[0], SMOOTHING
    differences = (s.f(theta + lam * u, s.rows) - s.f(theta - lam * u, s.rows)) / (2 * lam)
    return theta - RATE * ((differences.clamp(-CLIP, CLIP).sum() + s.noise[0]) / EXPECTED * u.double()).float()


def textbook_dpzo(theta, s):
    """Tang et al. 2025: l_i = clip_C(L(theta + phi z, x_i) - L(theta - phi z, x_i)), (sum_i l_i + Z) / (2 B phi)."""
    z, phi = s.u[0], SMOOTHING
    clipped = (s.f(theta + phi * z, s.rows) - s.f(theta - phi * z, s.rows)).clamp(-CLIP, CLIP)
    return theta - RATE * ((clipped.sum() + s.noise[0]) / (EXPECTED * 2 * phi) * z.double()).float()


def aggregated(theta, s, columns):
    """Bao et al. 2025, algorithm 1 with equation 21: D_agg = (D_1, ..., D_K) / K, scaled by c / max(c, |D_agg|)."""
    together = torch.stack(columns, dim=1) / len(s.u)
    scaled = together * (CLIP / together.norm(dim=1, keepdim=True).clamp(min=CLIP))
    gradient = sum((scaled[:, k].sum() + s.noise[k]) * s.u[k].double() for k in range(len(s.u)))
    return theta - (RATE / EXPECTED * gradient).float()


def textbook_aggzo(theta, s):
    phi = SMOOTHING
    return aggregated(
        theta, s, [(s.f(theta + phi * z, s.rows) - s.f(theta - phi * z, s.rows)) / (2 * phi) for z in s.u]
    )


def textbook_aggzo_forward(theta, s):
    here = s.f(theta, s.rows)
    return aggregated(theta, s, [(s.f(theta + SMOOTHING * z, s.rows) - here) / SMOOTHING for z in s.u])


def textbook_mezo(theta, s):
    """Malladi et al. 2023, definition 1: the mean over the batch and over K directions."""
    if not s.rows:
        return theta
    eps = SMOOTHING
    gradient = sum(
        (s.f(theta + eps * z, s.rows) - s.f(theta - eps * z, s.rows)).mean() / (2 * eps) * z.double() for z in s.u
    )
    return theta - (RATE / len(s.u) * gradient).float()


def textbook_zoso(theta, s):
    """Liu et al. 2025: stages of 1, 2, ... shares of the steps; g_p = (sum_i clip_C(d_ip) + n_p) / B for each p;
    theta <- theta - lr_s (mean_p g_p z_p + rho (theta - theta_s)), lr_s = lr / 2**s, and mu_s on its way to the last.
    """
    stage = 0 if s.t < 1 else 1  # Of three steps, the stages have one and two.
    mu, rate, rho = (SMOOTHING, LAST_SMOOTHING)[stage], RATE / 2**stage, ANCHOR
    if s.t in (0, 1):
        s.memory["anchor"] = theta.clone()
    gradient = rho * (theta - s.memory["anchor"]).double()
    for z, noise in zip(s.u, s.noise, strict=True):
        differences = (s.f(theta + mu * z, s.rows) - s.f(theta - mu * z, s.rows)) / (2 * mu)
        # The noise is that of a coefficient, and each coefficient is divided by P.
        gradient += (differences.clamp(-CLIP, CLIP).sum() + noise) / EXPECTED / len(s.u) * z.double()
    return theta - (rate * gradient).float()


def textbook_projected(theta, s):
    """x <- Proj(x - eta g), onto the ball around the first x; g as in Bao et al."""
    start = s.memory.setdefault("start", theta.clone())
    displacement = textbook_aggzo(theta, s) - start
    return start + displacement * min(1.0, s.radius / float(displacement.norm()))


STAGES = {"num_stages": 2, "final_smoothing": LAST_SMOOTHING, "anchor_strength": ANCHOR}
TEXTBOOK = {
    "dpzero": (textbook_dpzero, {"method": "dpzero"}),
    "dpzo": (textbook_dpzo, {"method": "dpzo"}),
    "dpzo-laplace": (textbook_dpzo, {"method": "dpzo", "noise": "laplace"}),
    "aggzo": (textbook_aggzo, {"method": "aggzo", "num_directions": 4}),
    "aggzo-forward": (textbook_aggzo_forward, {"method": "aggzo", "num_directions": 4, "difference": "forward"}),
    "mezo": (textbook_mezo, {"method": "mezo", "num_directions": 3}),
    "zoso": (textbook_zoso, {"method": "zoso", "num_directions": 2, **STAGES}),
    "zopo": (textbook_zoso, {"method": "zopo", "pruning_ratio": 0.3, **STAGES}),
    "projected": (textbook_projected, {"method": "projected", "radius": 0.02, "num_directions": 2}),
    "projected-inside": (textbook_projected, {"method": "projected", "radius": 10.0, "num_directions": 2}),
}


def test_every_method_has_a_textbook_twin():
    assert {settings["method"] for _, settings in TEXTBOOK.values()} == set(METHODS)


@each_with_each(TEXTBOOK, sorted(DIRECTIONS))
def test_run_agrees_with_the_textbook(name, lora, kind, tokenizer, make_args, monkeypatch):
    step, settings = TEXTBOOK[name]
    directions = settings.get("num_directions", 1)
    frozen = Frozen(monkeypatch, directions)
    base = one_layer()
    model = with_lora(base) if lora else base
    twin = copy.deepcopy(model)
    rows, collate = labelled_rows(ROWS), DataCollatorWithPadding(tokenizer)
    private = issubclass(METHODS[settings["method"]], PrivateMethod)
    args = make_args(
        **settings,
        noise_multiplier=1.0 if private else "absent",
        clip_norm=CLIP if private else "absent",
        target_delta=1e-4 if private else "absent",
        directions=kind,
        max_steps=STEPS,
        learning_rate=RATE,
        smoothing=SMOOTHING,
        lr_scheduler_type="constant",
    )
    trainer = ZOTrainer(model=model, args=args, train_dataset=rows, data_collator=collate, probe_rows=few_public_rows())
    trainer.train()

    parameters = in_order_of_the_optimizer(trainer, twin)
    theta, memory = flat(parameters), {}
    mask = unwrap_optimizer(trainer.optimizer).directions.mask
    numbered = DIRECTIONS[kind](seed=args.seed, sizes=[p.numel() for p in parameters], mask=mask)
    for t in range(STEPS):
        u = [
            torch.cat([numbered.values(index=i, step=t, direction=k) for i in range(len(parameters))])
            for k in range(directions)
        ]
        setting = Setting(
            u=u,
            f=lambda at, some: losses_at(twin, parameters, at, some, collate),
            rows=[rows[int(i)] for i in np.flatnonzero(frozen.masks[t])],
            noise=[integer * CLIP / 2**40 for integer in frozen.noise[t]],
            t=t,
            memory=memory,
            radius=settings.get("radius", 0.0),
        )
        theta = step(theta, setting)
    reached = flat(in_order_of_the_optimizer(trainer, trainer.model))
    torch.testing.assert_close(reached, theta, rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_cites_its_paper_and_describes_its_parameters(method):
    assert all(dataclasses.asdict(method.paper).values())
    assert method.__doc__ and "Args:" in method.__doc__
    assert all(re.search(rf"^ +{name}:", method.__doc__, re.MULTILINE) for name in list_parameters(method))


def test_aggzo_with_one_direction_is_dpzero():
    shared = {"noise_multiplier": 1.0, "expected_batch_size": 8, "smoothing": 0.1, "clip_norm": 2.0}
    one, other = METHODS["aggzo"](**shared, num_directions=1), METHODS["dpzero"](**shared)
    assert one.estimator == other.estimator
    assert one.mechanism == other.mechanism


def test_scaling_rule_keeps_the_noise_of_an_update():
    """K coefficients with noise of `sigma * beta / sqrt(K)` each: `sigma * beta` in all."""
    norms = [scaled_clip_norm(3.0, k) * math.sqrt(k) for k in (1, 4, 64)]
    assert norms == pytest.approx([3.0, 3.0, 3.0])
    with pytest.raises(ValueError, match="beta=0, num_directions=4: both must be positive"):
        scaled_clip_norm(0, 4)


def test_privacy_cost_does_not_depend_on_the_number_of_directions():
    queries = {
        METHODS["aggzo"](noise_multiplier=1.0, expected_batch_size=8, num_directions=k).mechanism.query(0.1)
        for k in (1, 16, 64)
    }
    assert len(queries) == 1
