"""The base model that a stranger's log names: its class, its head, and how much an adapter may add to it.

Guarantee: only models of transformers with heads for texts, images and sounds are built, and only of the kind that the
base model itself is. Weights come from safetensors or GGUF, never from a pickle. No code from a repository is run.
"""

import contextlib
import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import transformers
from peft import PeftConfig, get_peft_model
from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from hf_dpzo.io.foreign import describe_error
from hf_dpzo.io.strict_json import abbreviate
from hf_dpzo.losses.heads import HEADS, list_bodies, read_table
from hf_dpzo.models.location import resolve_path
from hf_dpzo.models.precision import build_loading_options
from hf_dpzo.trajectory.base_config import (
    ALWAYS_NUMBERS,
    BaseConfig,
    build_config,
    build_without_memory,
    count_numbers,
    silenced_loader,
)
from hf_dpzo.trajectory.base_files import BaseFiles
from hf_dpzo.trajectory.header import TrajectoryError


# The tables of heads that have no loss of their own in `losses`, but are trained by the loss that they return.
_OTHER_TABLES = (
    *("AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR", "CTC", "NEXT_SENTENCE_PREDICTION", "SEMANTIC_SEGMENTATION"),
    "TABLE_QUESTION_ANSWERING",
)


# Classes that may load parts which another library, or a configuration of any kind, names.
_OPEN_CLASSES = re.compile("Timm|DPT|Dpt|UperNet")


MODELS = {name for head in HEADS for name in head.architectures}
MODELS |= {name for table in _OTHER_TABLES for name in read_table(table)}
MODELS = frozenset(name for name in MODELS if not _OPEN_CLASSES.search(name))


# Models without a head, on whose features a head may be.
BODIES = frozenset(name for name in list_bodies() if not _OPEN_CLASSES.search(name))


# An adapter may add this many times the base model's numbers, and a few more that fit on any machine.
_GROWTH = 4


# The most numbers for which a byte of weights may stand: in safetensors one, in GGUF less than five.
_NUMBERS_PER_BYTE, _NUMBERS_PER_GGUF_BYTE = 1, 5


_LOADED = ("dtype", "quantization")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model: a user says where it is, and a log how it is loaded.

    Args:
        model_class: the model's class.
        location: a name on the Hub, or a folder.
        source: the commit to load from, and the file, where it is one GGUF file.
        head: the options that its head and its padding are built with.
        dtype: the type that its weights are loaded as; `None` for float32.
        quantization: the quantization after loading; `None` for none.
    """

    model_class: type[PreTrainedModel]
    location: str
    source: Mapping[str, Any]
    head: Mapping[str, Any]
    dtype: str | None = None
    quantization: str | None = None

    @classmethod
    def from_header(cls, base: str, revision: str | None, description: Mapping[str, Any]) -> Self:
        """Return the base model at `base`, as the `description` in a header asks for it.

        Args:
            base: a name on the Hub, a folder, package://name, or a GGUF file in one of these.
            revision: the branch, tag or commit; `None` for the one that the log names.
            description: the header's `base`.

        Raises:
            ValueError: the log asks for a class that is no such model, or the package does not exist.
        """
        is_read = "features" in description  # A head on features is built on the base model, and not within it.
        head = {} if is_read else dict(description["head"])
        if head.get("id2label") is not None:
            head["id2label"] = {int(number): label for number, label in head["id2label"].items()}
        source = {"revision": revision or description["revision"] or "main"}
        if base.endswith(".gguf"):
            base, _, source["gguf_file"] = base.rpartition("/")
        model_class = _find_model_class(description["architecture"], allowed=BODIES if is_read else MODELS)
        loading = {name: description.get(name) for name in _LOADED}
        return cls(model_class=model_class, location=resolve_path(base), source=source, head=head, **loading)

    @cached_property
    def _files(self) -> BaseFiles:
        return BaseFiles.find(self.location, self.source)

    def read_config(self) -> BaseConfig:
        """Read the model's configuration, with the head that the log asks for.

        Raises:
            TrajectoryError: the configuration is too large, of a model of another kind, or of one that has an adapter.
        """
        if "gguf_file" not in self.source:
            self._files.check_config_size()
        config, _ = PreTrainedConfig.get_config_dict(self.location, **self.source)
        wanted = self.model_class.config_class
        candidates = (config.get(wanted.base_config_key), config, *config.values())
        parts = [part for part in candidates if isinstance(part, dict)]
        part = next((part for part in parts if part.get("model_type") == wanted.model_type), None)
        # A class of another kind would use its own defaults for the sizes that it does not find.
        if part is None:
            raise TrajectoryError(
                f"architecture={self.model_class.__name__}: base={self.location} is of another kind, "
                f"{abbreviate(config.get('model_type'))}; name the model that the run began from."
            )
        # Transformers would load the adapter too, with everything that PEFT's configurations can do.
        if find_adapter_config_file(self.location, revision=self.source["revision"]) is not None:
            raise TrajectoryError(
                f"base={self.location}: there is an adapter in it, and a replay loads none; build the model, and call "
                "replay_onto."
            )
        return build_config(wanted, part, self.head)

    def load(self, config: BaseConfig) -> PreTrainedModel:
        """Load the model with `config`, as the run did.

        Guarantee: the numbers of the model are no more than the bytes of its files, and a few that fit on any machine.

        Raises:
            TrajectoryError: `config` asks for a larger model than the files hold, the log does not say how it was
                quantized, or it cannot be quantized that way here.
        """
        self._build_without_memory(config)
        try:
            loading = build_loading_options(self.dtype, self.quantization)
        except ValueError as error:
            raise TrajectoryError(str(error)) from None
        options = {**self.source, **loading, "config": config.known, "trust_remote_code": False}
        if "gguf_file" in self.source:
            if self.quantization is not None:
                raise TrajectoryError(
                    f"quantization={self.quantization}: a GGUF file is unpacked, and not quantized again; build the "
                    "model, and call replay_onto."
                )
            options["quantization_config"] = GgufConfig(dequantize=True)
        else:
            options["use_safetensors"] = True
        with silenced_loader():
            model = self.model_class.from_pretrained(self.location, **options).eval()
        config.restore_rest(model)
        return model

    def _build_without_memory(self, config: BaseConfig) -> PreTrainedModel:
        return build_without_memory(
            self.model_class,
            config.known,
            file_bytes=self._files.file_bytes,
            numbers_per_byte=_NUMBERS_PER_GGUF_BYTE if "gguf_file" in self.source else _NUMBERS_PER_BYTE,
        )

    def check_growth(self, config: BaseConfig, adapter: PeftConfig) -> None:
        """Raise `TrajectoryError` if `adapter` adds more than a replay may take. No weights are loaded to find out."""
        model = self._build_without_memory(config)
        before = count_numbers(model)
        with torch.device("meta"):
            added = count_numbers(get_peft_model(model, copy.deepcopy(adapter))) - before
        if added > _GROWTH * before + ALWAYS_NUMBERS:
            raise TrajectoryError(
                f"adapter: it adds {added} numbers to a model of {before}, more than a replay takes from a log; make "
                "the adapter yourself, and call replay_onto."
            )


@contextlib.contextmanager
def one_sentence_errors(base: str) -> Iterator[None]:
    """Turn every error of a replay from `base` into one sentence, because a stranger may have written the log.

    Raises:
        TrajectoryError: the replay failed.
        OSError: the base model cannot be loaded.
    """
    try:
        yield
    except TrajectoryError:
        raise
    except Exception as error:
        reason = describe_error(error, limit=200)
        if isinstance(error, OSError):
            raise OSError(
                f"base={base}: it can not be loaded from safetensors ({reason}); name another place, or build the "
                "model, and call replay_onto."
            ) from error
        raise TrajectoryError(
            f"base={base}: what the log asks for fails on it ({reason}); name the model that the run began from."
        ) from error


def _find_model_class(architecture: str, *, allowed: Collection[str]) -> type[PreTrainedModel]:
    model_class = getattr(transformers, architecture, None) if architecture in allowed else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise TrajectoryError(
            f"architecture={architecture}: transformers has no such model; build it, and call replay_onto."
        )
    return model_class
