"""What is compared. Each takes the same number of steps on the same batch, and is measured by the same meter."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from meter import Meter
from mezo_twin import MezoTwin
from subjects import RATE, SMOOTHING, Subject
from transformers import TrainerCallback

from hf_dpzo import ZOTrainer, ZOTrainingArguments
from hf_dpzo.zo import directions as perturbation


def floor(subject: Subject, steps: int, meter: Meter, *, passes: int = 2) -> None:
    """The forward passes of a step, and nothing else."""

    @torch.no_grad()
    def step() -> None:
        for _ in range(passes):
            subject.loss(subject.model, subject.inputs)

    _repeat(step, steps, meter)


def ours(subject: Subject, steps: int, meter: Meter, **arguments: Any) -> None:
    """Whole steps of `ZOTrainer`, in its loop, with the training `arguments` of a contender.

    The data are as many rows as a batch has on average, so that each joins every batch.
    """
    rows = len(subject.rows)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "method": "dpzero",
            "noise_multiplier": 1.0,
            "target_delta": 1e-5,
            "smoothing": SMOOTHING,
            "learning_rate": RATE,
            "expected_batch_size": rows,
            "per_device_train_batch_size": rows,
            "max_steps": steps + 1,
            "output_dir": folder,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        trainer = ZOTrainer(
            model=subject.model,
            args=ZOTrainingArguments(**{**settings, **arguments}),
            train_dataset=subject.rows,
            per_example_loss=subject.loss,
            callbacks=[_Laps(meter)],
        )
        trainer.train()


def ours_by_numpy(subject: Subject, steps: int, meter: Meter, **arguments: Any) -> None:
    """The same where Numba is not installed."""
    perturbation.compile_kernel = lambda: None
    ours(subject, steps, meter, **arguments)


def mezo(subject: Subject, steps: int, meter: Meter) -> None:
    """MeZO as published."""
    twin = MezoTwin(subject.model, learning_rate=RATE, eps=SMOOTHING)
    _repeat(lambda: twin.step(subject.loss, subject.inputs), steps, meter)


def dp_sgd(subject: Subject, steps: int, meter: Meter, *, clipping: str) -> None:
    """DP-SGD through Opacus."""
    from dp_sgd import make_step

    _repeat(make_step(subject, clipping=clipping), steps, meter)


def adamw(subject: Subject, steps: int, meter: Meter) -> None:
    """Backpropagation and AdamW, without privacy."""
    subject.model.train()
    optimizer = torch.optim.AdamW(subject.trained, lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        subject.loss(subject.model, subject.inputs).mean().backward()
        optimizer.step()

    _repeat(step, steps, meter)


KINDS: dict[str, Callable[..., None]] = {
    "floor": floor,
    "ours": ours,
    "ours-by-numpy": ours_by_numpy,
    "mezo": mezo,
    "dp-sgd": dp_sgd,
    "adamw": adamw,
}


class _Laps(TrainerCallback):
    """From the end of one step to the end of the next one, with all that the loop does in between."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 0:
            self._meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._meter.lap()


def _repeat(step: Callable[[], None], steps: int, meter: Meter) -> None:
    meter.start()
    for _ in range(steps + 1):
        step()
        meter.lap()
