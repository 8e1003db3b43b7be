"""What forward differences cost and save: bias, noise and time, on the model and the data of lora.yaml.

    python benchmarks/differences.py

For rows of real text, the coefficients of each row along the same directions by central and by forward differences, at
several smoothings. The spread of coefficients is what clipping acts on; a bias of a small part of it is harmless.
"""

import sys
import time

import torch
from shared import LoraRun, table
from transformers import DataCollatorWithPadding

from hf_dpzo.zo.directions import Rademacher
from hf_dpzo.zo.spsa import CentralDifference, FiniteDifference, ForwardDifference
from hf_dpzo.zo.walk import CopyingWalk


ROWS, DIRECTIONS = 32, 8
SMOOTHINGS = (1e-3, 1e-2, 5e-2)
TITLES = ("smoothing", "spread of a row's coefficient", "mean bias", "spread of the bias", "same sign", "time")


def main() -> None:
    """Measure, and print a table."""
    start = LoraRun.load()
    model = start.model()
    loss = start.loss(model)
    inputs = DataCollatorWithPadding(start.tokenizer)([start.train[i] for i in range(ROWS)])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    directions = Rademacher(seed=start.args.seed, sizes=[parameter.numel() for parameter in parameters])
    # A new adapter is a saddle, since half of its matrices are zero: look at one that has moved.
    for index, parameter in enumerate(parameters):
        directions.add_(parameter, index=index, step=1, weights={0: 1e-2})

    def coefficients(kind: type[FiniteDifference], smoothing: float) -> tuple[torch.Tensor, float]:
        started = time.perf_counter()
        estimator = kind(smoothing=smoothing, num_directions=DIRECTIONS)
        with torch.no_grad(), CopyingWalk(parameters, directions, step=0, points=estimator.points) as walk:
            losses = torch.stack([loss(model, inputs).double() for _ in walk], dim=1)
        return estimator.coefficients(losses) * DIRECTIONS, time.perf_counter() - started

    rows = []
    for smoothing in SMOOTHINGS:
        (central, slow), (forward, fast) = (coefficients(k, smoothing) for k in (CentralDifference, ForwardDifference))
        bias = forward - central
        same = (forward.sign() == central.sign()).double().mean()
        figures = (central.std(), bias.mean(), bias.std(), same, fast / slow)
        rows.append([f"{smoothing:g}", *(f"{float(figure):.3g}" for figure in figures)])
    note = f"{ROWS} rows, {DIRECTIONS} directions; time is that of forward over central."
    sys.stdout.write("\n".join([*table(TITLES, rows), "", note]) + "\n")


if __name__ == "__main__":
    main()
