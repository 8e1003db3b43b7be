"""From a log back to weights, without data: bit for bit what the run made."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import get_peft_model
from transformers import PreTrainedModel

from hf_dpzo.methods import METHODS
from hf_dpzo.models.fingerprints import fingerprint_frozen, fingerprint_shapes, fingerprint_values
from hf_dpzo.models.location import PACKAGE_PREFIX
from hf_dpzo.models.seeded import publicly_seeded
from hf_dpzo.step.descent import Descent
from hf_dpzo.trajectory.adapters import build_adapter_config
from hf_dpzo.trajectory.base_model import BaseModel, one_sentence_errors
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import restore_initial_values
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.records import Record
from hf_dpzo.trajectory.run import ANYWHERE, describe_device, from_header
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.updates import UPDATES


def replay_records(descent: Descent, records: Iterable[Record]) -> None:
    """Take the steps of `records` again. The parameters are where the first of them began.

    Raises:
        TrajectoryError: a record holds another smoothing or mask than this run would use.
    """
    unit = descent.method.mechanism.unit
    for record in records:
        stage = descent.begin(record.step)
        found = (stage.smoothing, descent.mask_fingerprint)
        if found != (record.smoothing, record.mask_fingerprint):
            raise TrajectoryError(
                f"step={record.step}: the log has smoothing and mask {(record.smoothing, record.mask_fingerprint)}, "
                f"and this machine makes {found}; replay where the run was trained."
            )
        with descent.walk(record.step) as walk:
            for _ in walk:
                pass  # Without data there is nothing to evaluate.
        for group, rate in zip(descent.optimizer.param_groups, record.learning_rates, strict=True):
            group["lr"] = rate
        descent.optimizer.receive(step=record.step, coefficients=[integer * unit for integer in record.integers])
        descent.optimizer.step()


def replay_onto(model: torch.nn.Module, log: Trajectory, *, at_step: int | None = None, anywhere: bool = False) -> None:
    """Give `model`, which is where the run began, the weights that it had after `at_step` steps; by default after all.

    Args:
        model: with its adapter, if it has one.
        log: of the run.
        at_step: how many steps to take.
        anywhere: whether to replay also where the last bit may differ.

    Raises:
        TrajectoryError: the model is another one, the device is of another kind, or there are fewer steps.
    """
    steps = len(log.records) if at_step is None else at_step
    if not 0 <= steps <= len(log.records):
        raise TrajectoryError(f"at_step={steps}: the log has {len(log.records)} steps; choose one of them.")
    trained = select_trained_parameters(log, model)
    check_start(log, fingerprint_frozen(model, trained.values()), fingerprint_values(trained.values()))
    if not anywhere:
        check_device(log, next(model.parameters()).device)
    groups = [
        {"params": [trained[name] for name in group["parameters"]], "weight_decay": group["weight_decay"]}
        for group in log.header["groups"]
    ]
    method, update = from_header(METHODS, log.header["method"]), from_header(UPDATES, log.header["update"])
    optimizer = ZOOptimizer(
        groups,
        directions=DIRECTIONS[log.header["directions"]["name"]],
        seed=log.header["directions"]["seed"],
        lr=0.0,
        update=update,
        constraint=method.constraint,
    )
    planned = log.header["plan"]["steps"]
    descent = Descent(model=model.eval(), optimizer=optimizer, method=method, planned_steps=planned)
    with one_sentence_errors(log.header["base"]["name"]):
        replay_records(descent, log.records[:steps])


def rebuild_model(
    base: str, path: str | Path, *, at_step: int | None = None, revision: str | None = None
) -> PreTrainedModel:
    """Return the model that the log at `path` leads to from `base`: on the Hub, a folder, or package://name.

    Anybody may have written the log. It can make this take long, but not run code, and not take more memory than the
    base model and an adapter do.

    Raises:
        ValueError: `base` is not what the run began from, or what it began from was not kept.
        OSError: `base` can not be loaded.
    """
    log = Trajectory.read(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    model = build_initial_model(base, revision, log)
    restore_initial_values(model, folder)
    replay_onto(model, log, at_step=at_step)
    return model


def check_start(log: Trajectory, frozen: str, initial: str) -> None:
    """Raise `TrajectoryError` where a run begins from other weights than `log` did."""
    if frozen != log.header["base"]["frozen"]:
        raise TrajectoryError(
            f"base={log.header['base']['name']}: the weights that are not trained are others than those that the log "
            "began with; start from the same model."
        )
    if initial != log.header["trained"]["initial"]:
        raise TrajectoryError(
            "model: the initial values of what is trained are others than those that the log began with; load the base "
            "model anew, and initialize what is new from the same seed."
        )


def replays_bitwise(log: Trajectory, device: torch.device) -> bool:
    """Whether a replay of `log` on `device` makes the same bits."""
    return log.header["replays_on"] in (ANYWHERE, describe_device(device))


def check_device(log: Trajectory, device: torch.device) -> None:
    """Raise `TrajectoryError` where a replay on `device` could differ in the last bit."""
    if not replays_bitwise(log, device):
        raise TrajectoryError(
            f"device={describe_device(device)}: this run replays bit for bit on {log.header['replays_on']} alone; "
            "replay there."
        )


def locate_base_model(header: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the name of the base model, and its revision, where an untrusted log may name it: on the Hub, or packaged.

    Raises:
        TrajectoryError: it names something else, or what could be a folder here.
    """
    name, revision = header["base"]["name"], header["base"]["revision"]
    if name.startswith(PACKAGE_PREFIX):
        return name, None
    folder = name.rpartition("/")[0] if name.endswith(".gguf") else name
    try:
        validate_repo_id(folder)
    except HFValidationError:
        revision = None
    if revision is None or Path(folder).exists():
        raise TrajectoryError(
            f"base={name}: the log does not say that it is on the Hub, or there is a folder of that name here; name "
            "where it is here, as base."
        )
    return name, revision


def build_initial_model(base: str, revision: str | None, log: Trajectory) -> torch.nn.Module:
    """Return what the run began from, but for initial values that were saved. Anybody may have written the log.

    Raises:
        ValueError: the log does not describe a run on `base`, or asks for what no log may ask for.
        OSError: `base` can not be loaded.
    """
    header = log.header
    source, adapter = BaseModel.from_header(base, revision, header["base"]), header["adapter"]
    with one_sentence_errors(base):
        wanted, config = None if adapter is None else build_adapter_config(adapter["config"]), source.read_config()
        if wanted is not None:
            source.check_growth(config, wanted)
        with publicly_seeded(header["directions"]["seed"]):
            model = source.load(config)
        model.config.name_or_path = header["base"]["name"]
        if wanted is None:
            return model
        with publicly_seeded(adapter["seed"] or 0):
            return get_peft_model(model, wanted)


def select_trained_parameters(log: Trajectory, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of `model` that `log` moves, in its order; raise where some are not there."""
    names = [name for group in log.header["groups"] for name in group["parameters"]]
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name] for name in names if name in parameters}
    if log.header["trained"]["shapes"] != fingerprint_shapes(trained):
        raise TrajectoryError("model: it has not the parameters that the log trains; start from the same model.")
    return trained
