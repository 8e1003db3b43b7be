"""What of a stranger's configuration of a base model reaches a loader, and how much a model of it may take.

Guarantee: only the keys that the model's own class reads reach the loader. No other key can ask for a kernel or code
from the Hub, for a quantizer, for other files, or for a type. Numbers by which models repeat their parts are bounded
before anything is built, the parts themselves while a model without memory is built, and the size of the whole by that
of its files.
"""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_dpzo.trajectory.header import TrajectoryError


# The Hub's name of the file, and the most bytes that it may have.
CONFIG_FILE, MAX_CONFIG_BYTES = "config.json", 1 << 20


# Keys that every class reads, though it may not declare them.
_SHARED = {
    *("num_labels", "tie_word_embeddings", "tie_encoder_decoder", "is_decoder", "add_cross_attention"),
    *("rope_theta", "rope_scaling", "partial_rotary_factor"),
}


# What says how weights are loaded, and not what the model is. A log says it instead, within bounds.
_LOADING = {
    *("dtype", "torch_dtype", "quantization_config", "attn_implementation", "experts_implementation"),
    *("transformers_weights", "per_layer_config", "use_kernels", "kernel_config", "name_or_path"),
}


# Models repeat their parts by numbers with such names, unless they are sizes. Modules are counted as they are made.
_REPEATED = re.compile("layer|depth|block|group|stage|expert|head|label|codebook")
_SIZES, _MOST_REPEATED = re.compile("size|vocab|theta|dim"), 1 << 16


# Without rotary embeddings, a position takes part of a table. Some are computed number by number.
_POSITIONS, _ALWAYS_POSITIONS, _BYTES_PER_POSITION = re.compile("position|n_ctx"), 4096, 16


# A model has at most so many modules, whatever its size, and so many more for each of the bytes of its files.
_ALWAYS_MODULES, _BYTES_PER_MODULE, _MOST_MODULES = 2_000, 512, 200_000


# A model of any size may have so many numbers, which fit on any machine: a fresh head has a few thousand.
ALWAYS_NUMBERS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """A configuration as a loader gets it, and the rest of what was read.

    Args:
        known: what the loader gets.
        rest: attributes that no class declares. They are put back once the model is there, for whoever saves it.
    """

    known: PreTrainedConfig
    rest: Mapping[str, Any]

    def restore_rest(self, model: PreTrainedModel) -> None:
        """Give the configuration of `model`, which is loaded, the attributes that the loader did not get."""
        for name, value in self.rest.items():
            setattr(model.config, name, value)


def build_config(kind: type[PreTrainedConfig], raw: Mapping[str, Any], head: Mapping[str, Any]) -> BaseConfig:
    """Build the configuration of class `kind` from what a stranger's file holds.

    Args:
        kind: the class of the configuration.
        raw: the content of the file.
        head: the options of the head and of the padding that a log asks for.

    Raises:
        TrajectoryError: a number by which the model repeats its parts is too large.
    """
    _check_repetitions(raw)
    known = kind.from_dict(_select_known(raw, kind), **head)
    methods = set(dir(kind)) - list_known_keys(kind)
    inert = {name: value for name, value in raw.items() if not _is_loading(name) and name not in methods}
    whole = vars(kind.from_dict(copy.deepcopy(inert), **head))
    rest = {name: value for name, value in whole.items() if name not in vars(known) and not name.startswith("_")}
    return BaseConfig(known=known, rest=rest)


def list_known_keys(kind: type[PreTrainedConfig]) -> set[str]:
    """List the keys that a class of configurations declares or reads.

    >>> from transformers import LlamaConfig
    >>> known = list_known_keys(LlamaConfig)
    >>> "vocab_size" in known, "rope_theta" in known, "auto_map" in known, "quantization_config" in known
    (True, True, False, False)
    """
    own = kind.__mro__[: kind.__mro__.index(PreTrainedConfig)]
    functions = [value for part in own for value in vars(part).values() if isinstance(value, FunctionType)]
    codes = [function.__code__ for function in functions]
    named = {name for code in codes for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
    declared = {field.name for field in dataclasses.fields(kind)}
    return {name for name in declared | named | set(kind.attribute_map) | _SHARED if not _is_loading(name)}


def _select_known(raw: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return what of `raw` the class `kind` knows, and of each part of it, what the part's class knows."""
    known = list_known_keys(kind) if issubclass(kind, PreTrainedConfig) else None
    parts = kind.sub_configs if issubclass(kind, PreTrainedConfig) else {}
    return {
        name: _select_known(value, parts.get(name, dict)) if isinstance(value, Mapping) else copy.deepcopy(value)
        for name, value in raw.items()
        if (name in known if known is not None else not _is_loading(name))
    }


def _is_loading(name: str) -> bool:
    return name.startswith("_") or name in _LOADING


def _check_repetitions(raw: Any, name: str = "") -> None:
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            _check_repetitions(value, str(key))
    elif isinstance(raw, list):
        for value in raw:
            _check_repetitions(value, name)
    elif isinstance(raw, int | float) and _counts_parts(name) and raw > _MOST_REPEATED:
        raise TrajectoryError(f"{CONFIG_FILE}: {name[:80]!a} is {raw:.6g}, and no model has so many; take it anew.")


def _counts_parts(name: str) -> bool:
    return _REPEATED.search(name) is not None and _SIZES.search(name) is None


def build_without_memory(
    kind: type[PreTrainedModel], config: PreTrainedConfig, *, file_bytes: int, numbers_per_byte: int
) -> PreTrainedModel:
    """Build a model that holds no numbers, and check that the one with numbers has no more than its files may hold.

    Args:
        kind: the model's class.
        config: its configuration.
        file_bytes: the bytes of the files that its weights come from.
        numbers_per_byte: the most numbers that a byte may stand for.

    Raises:
        TrajectoryError: the model has more numbers or parts than such files hold.
    """
    _check_positions(config, file_bytes)
    largest = min(_ALWAYS_MODULES + file_bytes // _BYTES_PER_MODULE, _MOST_MODULES)
    with torch.device("meta"), _count_modules(largest):
        model = kind(copy.deepcopy(config))
    numbers = count_numbers(model)
    if numbers > numbers_per_byte * file_bytes + ALWAYS_NUMBERS:
        raise TrajectoryError(
            f"{CONFIG_FILE}: it asks for a model of {numbers} numbers, and the files of its weights have {file_bytes} "
            "bytes; take them anew."
        )
    return model


def count_numbers(model: torch.nn.Module) -> int:
    """Count the numbers of the parameters and buffers of `model`, each once."""
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


def _check_positions(config: PreTrainedConfig, file_bytes: int) -> None:
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if "rope_parameters" in fields:
        return
    most = max(_ALWAYS_POSITIONS, file_bytes // _BYTES_PER_POSITION)
    for name, value in fields.items():
        if _POSITIONS.search(name) and type(value) is int and value > most:
            raise TrajectoryError(f"{CONFIG_FILE}: {name} is {value}, too many for files of {file_bytes} bytes.")


@contextlib.contextmanager
def _count_modules(largest: int) -> Iterator[None]:
    """Raise `TrajectoryError` inside as soon as more than `largest` modules become parts of others."""
    count = 0

    def check(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > largest:
            raise TrajectoryError(f"{CONFIG_FILE}: it asks for more than {largest} modules; take it anew.")

    handle = torch.nn.modules.module.register_module_module_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def silenced_loader() -> Iterator[None]:
    """Keep transformers from logging inside: it would write the names that a stranger gave tensors to the terminal."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
