"""The base model that a log of a stranger names: which class, which head, and how much an adapter adds to it.

Guarantee: no class but a text model of transformers is built, of the kind that the base model itself is; its weights
come from safetensors or GGUF, never from a pickle; no code of a repository is run.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import transformers
from peft import PeftConfig, get_peft_model
from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import find_adapter_config_file

from hf_dpzo.io.strict_json import abbreviate
from hf_dpzo.models.location import resolve_path
from hf_dpzo.models.precision import build_loading_options
from hf_dpzo.trajectory.header import TrajectoryError


MODELS = {
    *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
}


# What an adapter may add: so many times the numbers that the base model has, and so many that no machine minds.
_GROWTH, _ALWAYS = 4, 1 << 22


_LOADED = ("dtype", "quantization")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model: a user says where it is, and a log what is made of it.

    Args:
        model_class: its class.
        location: a name on the Hub, or a folder.
        source: which of the files there, and of which commit.
        head: what its head and its padding are made with.
        dtype: what its weights are loaded as; `None` for float32.
        quantization: how they are quantized then.
    """

    model_class: type[PreTrainedModel]
    location: str
    source: Mapping[str, Any]
    head: Mapping[str, Any]
    dtype: str | None = None
    quantization: str | None = None

    @classmethod
    def from_header(cls, base: str, revision: str | None, description: Mapping[str, Any]) -> Self:
        """Return what `description`, of a header, makes of `base`: on the Hub, a folder, package://name, or GGUF in it.

        Raises:
            ValueError: the log asks for a class that is no text model, or there is no such package.
        """
        head = dict(description["head"])
        if head.get("id2label") is not None:
            head["id2label"] = {int(number): label for number, label in head["id2label"].items()}
        source = {"revision": revision or description["revision"] or "main"}
        if base.endswith(".gguf"):
            base, _, source["gguf_file"] = base.rpartition("/")
        kind, loaded = _find_model_class(description["architecture"]), {name: description.get(name) for name in _LOADED}
        return cls(model_class=kind, location=resolve_path(base), source=source, head=head, **loaded)

    def read_config(self) -> PreTrainedConfig:
        """Read its configuration, with the head that the log asks for.

        Raises:
            TrajectoryError: it is of a model of another kind, or of one that has an adapter.
        """
        read, _ = PreTrainedConfig.get_config_dict(self.location, **self.source)
        wanted = self.model_class.config_class
        parts = [part for part in (read.get(wanted.base_config_key), read, *read.values()) if isinstance(part, dict)]
        part = next((part for part in parts if part.get("model_type") == wanted.model_type), None)
        # Another class would take its own sizes for those that it does not find there.
        if part is None:
            raise TrajectoryError(
                f"architecture={self.model_class.__name__}: base={self.location} is of another kind, "
                f"{abbreviate(read.get('model_type'))}; name the model that the run began from."
            )
        # Transformers would load it too, with all that PEFT's configurations can do.
        if find_adapter_config_file(self.location, revision=self.source["revision"]) is not None:
            raise TrajectoryError(
                f"base={self.location}: there is an adapter in it, and a replay loads none; build the model, and call "
                "replay_onto."
            )
        return wanted.from_dict(part, **self.head)

    def load(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Load it, as the run did.

        Raises:
            TrajectoryError: the log does not say how it was quantized, or that can not be done here.
        """
        try:
            loaded = build_loading_options(self.dtype, self.quantization)
        except ValueError as error:
            raise TrajectoryError(str(error)) from None
        options = {**self.source, **loaded, "config": config, "trust_remote_code": False}
        if "gguf_file" in self.source:
            if self.quantization is not None:
                raise TrajectoryError(
                    f"quantization={self.quantization}: a GGUF file is unpacked, and not quantized again; build the "
                    "model, and call replay_onto."
                )
            options["quantization_config"] = GgufConfig(dequantize=True)
        else:
            options["use_safetensors"] = True
        return self.model_class.from_pretrained(self.location, **options).eval()

    def check_growth(self, config: PreTrainedConfig, adapter: PeftConfig) -> None:
        """Raise `TrajectoryError` where `adapter` adds more than a replay may take. Nothing is loaded for that."""
        with torch.device("meta"):
            model = self.model_class(copy.deepcopy(config))
            before = _numbers(model)
            added = _numbers(get_peft_model(model, copy.deepcopy(adapter))) - before
        if added > _GROWTH * before + _ALWAYS:
            raise TrajectoryError(
                f"adapter: it adds {added} numbers to a model of {before}, more than a replay takes from a log; make "
                "the adapter yourself, and call replay_onto."
            )


@contextlib.contextmanager
def one_sentence_errors(base: str) -> Iterator[None]:
    """Make one sentence of whatever a replay from `base` runs into, by a log that anybody may have written.

    Raises:
        TrajectoryError: the replay failed.
        OSError: the base model can not be loaded.
    """
    try:
        yield
    except TrajectoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')!a:.200}"
        if isinstance(error, OSError):
            raise OSError(
                f"base={base}: it can not be loaded from safetensors ({reason}); name another place, or build the "
                "model, and call replay_onto."
            ) from error
        raise TrajectoryError(
            f"base={base}: what the log asks for fails on it ({reason}); name the model that the run began from."
        ) from error


def _find_model_class(architecture: str) -> type[PreTrainedModel]:
    kind = getattr(transformers, architecture, None) if architecture in MODELS else None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise TrajectoryError(
            f"architecture={architecture}: transformers has no such text model; build it, and call replay_onto."
        )
    return kind


def _numbers(model: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
