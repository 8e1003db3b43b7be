"""A stranger's base model: only known keys reach a loader, and its memory is bounded by the sizes of its files."""

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_dpzo.trajectory import base_model
from hf_dpzo.trajectory.base_config import build_config
from hf_dpzo.trajectory.base_model import MODELS, BaseModel
from hf_dpzo.trajectory.header import TrajectoryError

from support.models import classifier


DESCRIPTION = {"revision": None, "architecture": "LlamaForSequenceClassification", "head": {}}


@pytest.fixture
def base(tmp_path) -> Path:
    torch.manual_seed(0)
    classifier().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def tamper(folder: Path, **changes) -> BaseModel:
    """Change the configuration of a base model, and open it."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return BaseModel.from_header(str(folder), None, DESCRIPTION)


def load(model: BaseModel) -> PreTrainedModel:
    with base_model.one_sentence_errors(model.location):
        return model.load(model.read_config())


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 2_000_000},
        {"hidden_size": 1 << 14},
        {"intermediate_size": 1 << 24},
        {"head_dim": 1 << 20},
        {"num_hidden_layers": 10**4},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e300},
        {"num_labels": 10**9},
        {"num_attention_heads": 10**8, "hidden_size": 10**9},
        {"id2label": {str(n): "x" for n in range(300_000)}},
    ],
    ids=lambda changes: f"{changes!s:.40}",
)
def test_a_configuration_beyond_its_files_takes_no_memory(base, changes):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.embed_tokens.weight"]  # A loader would make it anew, as large as the configuration says.
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    before, began = memory(), time.perf_counter()
    with pytest.raises((TrajectoryError, OSError)) as caught:
        load(tamper(base, **changes))
    assert memory() - before < 100 and time.perf_counter() - began < 20
    assert "\n" not in str(caught.value) and str(caught.value).isascii()


def test_a_configuration_that_is_no_small_file_is_not_read(base):
    (base / "config.json").write_text(" " * (2 << 20))
    with pytest.raises(TrajectoryError, match=r"config\.json: it has 2097152 bytes"):
        load(BaseModel.from_header(str(base), None, DESCRIPTION))
    (base / "config.json").unlink()
    (base / "config.json").symlink_to("/dev/zero")
    with pytest.raises(TrajectoryError, match=r"config\.json: there is none"):
        load(BaseModel.from_header(str(base), None, DESCRIPTION))


@pytest.mark.parametrize(
    "asked",
    [
        {"_attn_implementation": "stranger/kernel"},
        {"attn_implementation": "stranger/kernel"},
        {"_experts_implementation": "stranger/kernel", "experts_implementation": "stranger/kernel"},
        {"auto_map": {"AutoModelForSequenceClassification": "stranger/code--modeling.Model"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"transformers_weights": "../other.safetensors"},
        {"dtype": "float16", "torch_dtype": "float16"},
        {"use_kernels": True, "kernel_config": {"kernel_mapping": {"RMSNorm": "stranger/kernel"}}},
        {"per_layer_config": {"0": {"hidden_size": 64}}},
        {"name_or_path": "stranger/code", "_commit_hash": "0" * 40},
        {"surprise": {"trust_remote_code": True}},
        {"to_dict": 3, "save_pretrained": "x", "model_type_": "x"},
    ],
    ids=lambda asked: f"{asked!s:.40}",
)
def test_only_known_keys_reach_a_loader(base, asked, monkeypatch):
    seen = []
    stock = transformers.LlamaForSequenceClassification.from_pretrained.__func__

    def from_pretrained(kind, location, **options):
        seen.append({**vars(options["config"])})
        return stock(kind, location, **options)

    expected = load(BaseModel.from_header(str(base), None, DESCRIPTION)).state_dict()
    monkeypatch.setattr(transformers.LlamaForSequenceClassification, "from_pretrained", classmethod(from_pretrained))
    model = load(tamper(base, **asked))
    (attributes,) = seen
    assert not [name for name, value in asked.items() if attributes.get(name) == value]
    assert "stranger" not in repr(attributes)
    assert model.dtype == torch.float32 and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.items())


def test_what_is_unknown_is_kept_for_whoever_saves_the_model(base, tmp_path):
    """Older configurations have keys that no class declares, and an honest run saves them again."""
    load(tamper(base, gradient_checkpointing=False, surprise=[1, 2])).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["gradient_checkpointing"] is False and saved["surprise"] == [1, 2]


def test_a_strangers_names_of_tensors_are_not_written_to_the_terminal(base, capfd):
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "\x1b[2J": torch.zeros(1)}, base / "model.safetensors", metadata={"format": "pt"})
    load(BaseModel.from_header(str(base), None, DESCRIPTION))
    assert "\x1b[2J" not in "".join(capfd.readouterr())


def text_configurations() -> list:
    classes = (getattr(transformers, name, None) for name in sorted(MODELS))
    kinds = {kind.config_class for kind in classes if kind is not None and isinstance(kind.config_class, type)}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    return [pytest.param(kind, marks=[] if n % 8 == 0 else pytest.mark.slow, id=kind.__name__) for n, kind in
            enumerate(ordered)]  # fmt: skip


@pytest.mark.parametrize("kind", text_configurations())
def test_honest_configurations_are_read_as_transformers_reads_them(kind):
    try:
        default = json.loads(kind().to_json_string(use_diff=False)) | {"gradient_checkpointing": False}
        expected = kind.from_dict(shallow_copy(default)).to_dict()
    except Exception as error:
        pytest.skip(f"transformers does not read its own: {type(error).__name__}")
    config = build_config(kind, default, {})
    holder = torch.nn.Module()
    holder.config = config.known
    config.restore_rest(holder)
    assert holder.config.to_dict() == expected


def shallow_copy(value: dict) -> dict:
    return json.loads(json.dumps(value))


def test_modules_are_counted_by_a_hook_that_torch_has():
    """Without it, a configuration of many layers would take minutes."""
    seen = []
    handle = torch.nn.modules.module.register_module_module_registration_hook(lambda *given: seen.append(given[1]))
    try:
        torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ModuleList([torch.nn.ReLU()]))
    finally:
        handle.remove()
    assert len(seen) == 3


def test_a_base_of_shards_is_loaded(base):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    places = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        held = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(held, base / file, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert torch.equal(load(BaseModel.from_header(str(base), None, DESCRIPTION)).score.weight, tensors["score.weight"])


def test_a_base_without_a_head_gets_a_fresh_one(base):
    tensors = load_file(base / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert load(BaseModel.from_header(str(base), None, DESCRIPTION)).score.weight.isfinite().all()
    shutil.rmtree(base)
