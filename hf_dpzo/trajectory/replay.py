"""Replays a log without data, to get back the weights of its run bit for bit."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import get_peft_model
from transformers import PreTrainedModel

from hf_dpzo.methods import METHODS
from hf_dpzo.models.adapters import name_as_published
from hf_dpzo.models.fingerprints import fingerprint_frozen, fingerprint_shapes, fingerprint_values
from hf_dpzo.models.location import PACKAGE_PREFIX
from hf_dpzo.models.seeded import publicly_seeded
from hf_dpzo.step.descent import Descent
from hf_dpzo.trajectory.adapters import build_adapter_config
from hf_dpzo.trajectory.base_model import BaseModel, one_sentence_errors
from hf_dpzo.trajectory.feature_base import build_on_features
from hf_dpzo.trajectory.going_on import list_trained_names
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import restore_initial_values
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.records import Record
from hf_dpzo.trajectory.run import ANYWHERE, describe_device, from_header
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.optimizer import ZOOptimizer
from hf_dpzo.zo.updates import UPDATES
from hf_dpzo.zo.walk import Walk


def pass_through(step: int, walk: Walk) -> None:
    """Follow the `walk` of a step without evaluating anything, because a replay has no data."""
    for _ in walk:
        pass


def replay_records(
    descent: Descent,
    records: Iterable[Record],
    *,
    follow: Callable[[int, Walk], object] = pass_through,
    points_per_pass: int | None = None,
) -> None:
    """Take the steps of `records` again. The parameters must be where the first of these steps began.

    Args:
        descent: the descent that moves the parameters.
        records: the records of the steps, in order.
        follow: a function that is given each step and its walk, and goes through all stops of the walk.
        points_per_pass: the number of points of one stop, as in training; it changes no parameter.

    Raises:
        TrajectoryError: a record has another smoothing or mask than the replay computes.
    """
    unit = descent.method.mechanism.unit
    for record in records:
        stage = descent.begin(record.step)
        computed = (stage.smoothing, descent.mask_fingerprint)
        if computed != (record.smoothing, record.mask_fingerprint):
            raise TrajectoryError(
                f"step={record.step}: the log has smoothing and mask {(record.smoothing, record.mask_fingerprint)}, "
                f"and this machine makes {computed}; replay where the run was trained."
            )
        with descent.walk(record.step, points_per_pass=points_per_pass) as walk:
            follow(record.step, walk)
        for group, rate in zip(descent.optimizer.param_groups, record.learning_rates, strict=True):
            group["lr"] = rate
        descent.optimizer.receive(step=record.step, coefficients=[integer * unit for integer in record.integers])
        descent.optimizer.step()


def replay_onto(model: torch.nn.Module, log: Trajectory, *, at_step: int | None = None, anywhere: bool = False) -> None:
    """Replay `log` onto `model`, which must be where the run began.

    Args:
        model: the model, with its adapter if it has one. It moves in place, and is left in evaluation mode.
        log: the log of the run.
        at_step: the number of steps to take; by default all.
        anywhere: whether to replay also on a device where the last bit may differ.

    Raises:
        TrajectoryError: the model is another one, the device is of another kind, or the log has fewer steps.
    """
    steps = len(log.records) if at_step is None else at_step
    if not 0 <= steps <= len(log.records):
        raise TrajectoryError(f"at_step={steps}: the log has {len(log.records)} steps; choose one of them.")
    descent = build_replay(model, log)
    if not anywhere:
        check_device(log, next(model.parameters()).device)
    with one_sentence_errors(log.header["base"]["name"]):
        replay_records(descent, log.records[:steps])


def build_replay(model: torch.nn.Module, log: Trajectory) -> Descent:
    """Return what takes the steps of `log` again from the values of `model`, which must be where the run began.

    Raises:
        TrajectoryError: the model is another one, or is elsewhere.
    """
    trained = select_trained_parameters(log, model)
    check_start(log, fingerprint_frozen(model, trained.values()), fingerprint_values(trained.values()))
    with one_sentence_errors(log.header["base"]["name"]):
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
        scales = log.header.get("scales", {})
        optimizer.scale_directions([scales.get(name, 1.0) for name in list_trained_names(log.header)])
        planned = log.header["plan"]["steps"]
        return Descent(model=model.eval(), optimizer=optimizer, method=method, planned_steps=planned)


def rebuild_model(
    base: str, path: str | Path, *, at_step: int | None = None, revision: str | None = None
) -> PreTrainedModel:
    """Return the model that the log at `path` leads to from `base`.

    Guarantee: a stranger may have written the log. It can make the replay slow, but it cannot run code, and the replay
    takes no more memory than the base model and an adapter do.

    Args:
        base: the base model: a name on the Hub, a folder, or package://name.
        path: the log, or the folder that holds it.
        at_step: the number of steps to take; by default all.
        revision: the branch, tag or commit of `base`; by default the one that the log names.

    Raises:
        ValueError: the run began from another model than `base`, or from values that were not kept.
        OSError: `base` cannot be loaded.
    """
    log = Trajectory.read(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    model = build_initial_model(base, revision, log)
    restore_initial_values(model, folder)
    replay_onto(model, log, at_step=at_step)
    return model


def check_start(log: Trajectory, frozen: str, initial: str) -> None:
    """Raise `TrajectoryError` if a run begins from other weights than `log` did, by their fingerprints."""
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
    """Return whether a replay of `log` on `device` gives the same bits."""
    return log.header["replays_on"] in (ANYWHERE, describe_device(device))


def check_device(log: Trajectory, device: torch.device) -> None:
    """Raise `TrajectoryError` if a replay on `device` could differ in the last bit."""
    if not replays_bitwise(log, device):
        raise TrajectoryError(
            f"device={describe_device(device)}: this run replays bit for bit on {log.header['replays_on']} alone; "
            "replay there."
        )


def locate_base_model(header: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the base model's name and revision from an untrusted header: on the Hub, or in a Python package.

    Raises:
        TrajectoryError: the header names something else, or a name that is also a folder here.
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
    """Return the model that the run began from, without the initial values that were saved beside the log.

    A stranger may have written the log.

    Raises:
        ValueError: the log does not describe a run on `base`, or asks for something that no log may ask for.
        OSError: `base` cannot be loaded.
    """
    header = log.header
    adapter = header["adapter"]
    base_model = BaseModel.from_header(base, revision, header["base"])
    with one_sentence_errors(base):
        adapter_config = None if adapter is None else build_adapter_config(adapter["config"])
        config = base_model.read_config()
        if adapter_config is not None:
            base_model.check_growth(config, adapter_config)
        with publicly_seeded(header["directions"]["seed"]):
            model = base_model.load(config)
        model.config.name_or_path = header["base"]["name"]
        if "features" in header["base"]:
            model = build_on_features(model, header["base"])
        if adapter_config is None:
            return model
        # Earlier versions kept no seed where a part of an adapter was frozen. That of a recipe is also its directions'.
        with publicly_seeded(header["directions"]["seed"] if adapter["seed"] is None else adapter["seed"]):
            return get_peft_model(model, adapter_config)


def select_trained_parameters(log: Trajectory, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of `model` that `log` moves, in its order; raise `TrajectoryError` if any is missing."""
    names = [name for group in log.header["groups"] for name in group["parameters"]]
    own = dict(model.named_parameters())  # By these, logs of version 2 name an adapter that is not called "default".
    parameters = own | name_as_published(model, own)
    trained = {name: parameters[name] for name in names if name in parameters}
    if log.header["trained"]["shapes"] != fingerprint_shapes(trained):
        raise TrajectoryError("model: it has not the parameters that the log trains; start from the same model.")
    return trained
