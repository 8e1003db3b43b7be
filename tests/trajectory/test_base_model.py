"""Logs of strangers: what they may not do to whoever reads them and replays them."""

import copy
import hashlib
import json
import math
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer, ZOTrainingArguments
from hf_dpzo.cli.main import main
from hf_dpzo.io.strict_json import SCHEMA_FOLDER
from hf_dpzo.methods import METHODS
from hf_dpzo.methods.method import list_parameters
from hf_dpzo.models.location import resolve_path
from hf_dpzo.privacy.queries import MAX_NOISE_MULTIPLIER, QUERIES, NonPrivateQuery
from hf_dpzo.trajectory.adapters import build_adapter_config
from hf_dpzo.trajectory.base_model import MODELS
from hf_dpzo.trajectory.header import MAX_HEADER_BYTES, TrajectoryError
from hf_dpzo.trajectory.initial import INITIAL_FILE, MAX_TENSOR_HEADER_BYTES
from hf_dpzo.trajectory.log import LOG_FILE, MAGIC, MAX_LOG_BYTES, Trajectory
from hf_dpzo.trajectory.records import Record, RecordLayout
from hf_dpzo.trajectory.replay import locate_base_model, rebuild_model
from hf_dpzo.zo.directions import DIRECTIONS
from hf_dpzo.zo.updates import UPDATES

from support.models import classifier
from support.rows import labelled_rows


MB = 1 << 20


@pytest.fixture(scope="module")
def honest(tmp_path_factory, tokenizer) -> tuple[str, Path]:
    """A base model, and the folder of a run on it."""
    folder = tmp_path_factory.mktemp("honest")
    torch.manual_seed(0)
    base = classifier()
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj", "v_proj"]))
    trainer = ZOTrainer(
        model=model,
        args=ZOTrainingArguments(
            output_dir=str(folder / "run"),
            method="dpzero",
            noise_multiplier=1.0,
            target_delta=1e-4,
            expected_batch_size=8,
            max_steps=3,
            smoothing=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=labelled_rows(20),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    return str(folder / "base"), folder / "run"


@pytest.fixture
def stranger(honest, tmp_path):
    """Makes logs that no run wrote, with checksums that are right, beside the initial values of the honest one."""
    (tmp_path / INITIAL_FILE).write_bytes((honest[1] / INITIAL_FILE).read_bytes())
    log = Trajectory.read(honest[1])

    def forge(*, raw: bytes | None = None, records: list[Record] | None = None, **changes) -> Path:
        header = copy.deepcopy(dict(log.header))
        for name, value in changes.items():
            change(header, name.split("__"), value)
        write_log(tmp_path, json.dumps(header).encode() if raw is None else raw, records or log.records, log.layout)
        return tmp_path

    return forge


def change(header: dict, path: list[str], value) -> None:
    for name in path[:-1]:
        header = header[name]
    if value is ...:
        del header[path[-1]]
    else:
        header[path[-1]] = value


def write_log(folder: Path, text: bytes, records, layout: RecordLayout) -> None:
    start = MAGIC + struct.pack("<I", len(text)) + text
    digest = hashlib.sha256(start).digest()
    data, before = start + digest, digest[:16]
    for record in records:
        piece = layout.pack(record, before)
        data, before = data + piece, piece[-16:]
    (folder / LOG_FILE).write_bytes(data)


def refusal(work) -> str:
    """The one sentence that `work` ends in, at once, and without any memory to speak of."""
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        work()
    assert time.perf_counter() - began < 20
    assert tracemalloc.get_traced_memory()[1] < 100 * MB
    tracemalloc.stop()
    said = str(caught.value)
    assert isinstance(caught.value, TrajectoryError)
    assert said.isprintable() and said.endswith(".") and len(said) < 700, said
    return said


# ---- Reading ----


def test_the_honest_log_is_read_and_rebuilt(honest, stranger):
    base, folder = honest
    assert Trajectory.read(stranger()).records == Trajectory.read(folder).records
    rebuild_model(base, stranger())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"{}",
        b'{"base": NaN}',
        b'{"base": 1e999}',
        b'{"base": -Infinity}',
        b'{"base": 1, "base": 1}',
        b'{"base": "\\ud800"}',
        b"1" * 100_000,
        b"[" * 500_000,
        b'{"base":' * 100_000,
        b'{"base":' * 20 + b"1" + b"}" * 20,
        b"[" + b"[]," * 300_000 + b"[]]",
        b"{" + b",".join(b'"%d":0' % i for i in range(90_000)) + b"}",
        b" " * (MAX_HEADER_BYTES + 1),
    ],
    ids=lambda raw: f"{raw[:24]!r} {len(raw)}",
)
def test_headers_that_no_run_writes_get_one_sentence(raw, stranger):
    assert "header" in refusal(lambda: Trajectory.read(stranger(raw=raw))) or raw.startswith(b'{"0"')


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_directions", True),
        ("num_directions", 1.0),
        ("num_directions", 10**9),
        ("num_directions", "1"),
        ("num_directions", 10**4000),
        ("num_directions", 2),  # The method has one.
        ("groups", "text"),
        ("groups", []),
        ("groups", [{}]),
        ("groups", [{"weight_decay": 0.0, "parameters": [1]}]),
        ("groups", [{"weight_decay": 0.0, "parameters": ["a", "a"]}]),
        ("groups", [{"weight_decay": 0.0, "parameters": []}]),
        ("groups", [{"weight_decay": "0", "parameters": ["a"]}] * 2000),
        ("plan__steps", 0),
        ("plan__steps", 10**8),
        ("plan__steps", 3.0),
        ("plan__trials", 1),  # There is one where none are named.
        ("plan__trials", 2.5),
        ("plan__trials", 10**7),  # With several steps each.
        ("plan__delta", 1.0),
        ("plan__delta", 0),
        ("plan__query__name", "os.system"),
        ("plan__query__noise_multiplier", 8192),
        ("plan__query__sampling_rate", 2),
        ("rows", None),
        ("rows__units", 10**13),
        ("rows__units", -1),
        ("rows__rows", 0.5),
        ("rows__rows", ...),
        ("rows__rows", None),  # Each row is a unit.
        ("rows__surprise", 1),
        ("surprise", 1),
        ("base", ...),
        ("base__name", "x" * 5000),
        ("base__name", "\x1b[2J"),
        ("base__name", 5),
        ("base__revision", "../../refs/x"),
        ("base__revision", "main"),
        ("base__architecture", 5),
        ("base__head__id2label", 5),
        ("base__head__id2label", {"one": "a"}),
        ("base__head__id2label", {str(i): "" for i in range(65537)}),
        ("base__head__trust_remote_code", True),
        ("base__frozen", "0" * 63),
        ("adapter__seed", 2**70),
        ("adapter__config", []),
        ("adapter__config", {"rank_pattern": [[[[[[[[[[]]]]]]]]]]}),
        ("directions", {}),
        ("directions__seed", 2**64),
        ("directions__name", "os.system"),
        ("method__name", 5),
        ("method__clip_norm", "text"),
        ("method__clip_norm", 0),
        ("method__noise_multiplier", [1]),
        ("method__num_stages", 10**9),
        ("method__difference", "sideways"),
        ("method__surprise", 1),
        ("update__betas", [0.9] * 3),
        ("update__momentum", 1),
        ("trained__initial", 5),
        ("replays_on", ["cpu"]),
        ("made_with", {"isolation": {"status": "x"}, "versions": {}}),
        ("made_with", ...),
        ("made_with__isolation", None),
        ("made_with__isolation__bound_in_clip_norms", -1),
        ("made_with__versions", {"torch": 2}),
    ],
    ids=lambda value: f"{value!s:.30}",
)
def test_header_fields_of_other_types_and_sizes_are_named(name, value, stranger):
    said = refusal(lambda: Trajectory.read(stranger(**{name: value})))
    assert name.split("__")[0] in said or "header" in said


def test_a_log_of_another_method_is_refused_where_it_is_used(stranger, honest):
    """Names are known where the classes are; the format has room for newer ones."""
    for changes in ({"method__name": "newer"}, {"update__name": "newer"}, {"method__name": "mezo"}):
        assert "name=" in refusal(lambda changes=changes: rebuild_model(honest[0], stranger(**changes)))


@pytest.mark.parametrize(
    "changes", [{"learning_rates": (math.nan, 1.0)}, {"learning_rates": (1.0, math.inf)}, {"smoothing": -math.inf}]
)
def test_records_without_finite_numbers_are_refused(changes, stranger, honest):
    records = list(Trajectory.read(honest[1]).records)
    records[1] = replace(records[1], **changes)
    assert "record 1 holds a number that is not finite" in refusal(lambda: Trajectory.read(stranger(records=records)))


def test_more_records_than_steps_are_refused(stranger):
    assert "plan.steps=2: there are more records" in refusal(lambda: Trajectory.read(stranger(plan__steps=2)))


def test_huge_files_are_not_read(stranger):
    folder = stranger()
    os.truncate(folder / LOG_FILE, MAX_LOG_BYTES + 1)  # Sparse: it takes no room.
    assert f"it has more than {MAX_LOG_BYTES} bytes" in refusal(lambda: Trajectory.read(folder))


def test_huge_records_are_not_made(stranger):
    """One record of 65536 directions and 1024 groups would have half a megabyte, and there is none."""
    groups = [{"weight_decay": 0.0, "parameters": [f"p{i}"]} for i in range(1024)]
    changes = {"num_directions": 65536, "method__name": "aggzo", "method__num_directions": 65536, "groups": groups}
    assert len(Trajectory.read(stranger(**changes, method__paper_noise=...)).records) == 0


def test_what_is_no_file_is_not_opened(tmp_path):
    """A pipe would keep its reader waiting."""
    os.mkfifo(tmp_path / LOG_FILE)
    assert "there is no log of a run" in refusal(lambda: Trajectory.read(tmp_path))
    (tmp_path / LOG_FILE).unlink()
    (tmp_path / LOG_FILE).symlink_to("/dev/zero")
    assert "there is no log of a run" in refusal(lambda: Trajectory.read(tmp_path))


def test_format_and_code_agree():
    """A parameter that a method takes, and a choice that it has, can be logged."""
    header = json.loads((SCHEMA_FOLDER / "trajectory-header.json").read_text(encoding="utf-8"))
    method, update = header["properties"]["method"]["properties"], header["properties"]["update"]["properties"]
    assert set(method) == {"name"}.union(*(list_parameters(kind) for kind in METHODS.values()))
    assert set(update) == {"name"}.union(*(list_parameters(kind) for kind in UPDATES.values()))
    assert header["properties"]["directions"]["properties"]["name"]["enum"] == list(DIRECTIONS)
    assert method["noise_multiplier"]["exclusiveMaximum"] == MAX_NOISE_MULTIPLIER
    queries = {kind.__name__ for kind in (*QUERIES.values(), NonPrivateQuery)}
    assert set(header["properties"]["plan"]["properties"]["query"]["properties"]["name"]["enum"]) == queries


# ---- Adapters ----


@pytest.fixture
def sentinel(tmp_path, monkeypatch) -> str:
    """The name of a module that must not be imported."""
    (tmp_path / "stranger_code.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    yield "stranger_code"
    assert "stranger_code" not in sys.modules


SLOW = "(a+)+" * 20 + "!"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"megatron_config": {}, "megatron_core": "stranger_code"}, "megatron_co"),
        ({"megatron_core": "stranger_code"}, "megatron_core"),
        ({"target_modules": SLOW}, "target_modules"),
        ({"target_modules": ".*_proj"}, "target_modules"),
        ({"target_modules": [5]}, "target_modules.0"),
        ({"exclude_modules": SLOW}, "exclude_modules"),
        ({"modules_to_save": [SLOW]}, "modules_to_save.0"),
        ({"modules_to_save": ["score\n"]}, "modules_to_save.0"),
        ({"modules_to_save": "score"}, "modules_to_save"),
        ({"layers_to_transform": [1], "layers_pattern": SLOW}, "layers_pattern"),
        ({"rank_pattern": {SLOW: 1}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern.q_proj"),
        ({"alpha_pattern": {SLOW: 1}}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "alpha_pattern.q_proj"),
        ({"r": 10**9}, "r=1000000000"),
        ({"r": 0}, "r=0"),
        ({"r": True}, "r=true"),
        ({"r": "8"}, 'r="8"'),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"layer_replication": [[0, 10**6]]}, "layer_replication"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "runtime_config"),
        ({"auto_mapping": {"base_model_class": "x", "parent_library": "stranger_code"}}, "auto_mapping"),
        ({"base_model_name_or_path": "org/other"}, "base_model_name_or_path"),
        ({"surprise": 1}, "surprise"),
        ({"task_type": "SURPRISE"}, "task_type"),
        ({"peft_type": "BOFT"}, "BOFT"),
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"peft_type": "NONE"}, "NONE"),
        ({"peft_type": ["LORA"]}, "['LORA']"),
        ({"peft_type": ...}, "None"),
    ],
    ids=lambda value: f"{value!s:.40}",
)
def test_adapters_that_no_log_may_ask_for_are_refused_by_name(changes, named, stranger, honest, sentinel):
    said = refusal(
        lambda: rebuild_model(honest[0], stranger(**{f"adapter__config__{n}": v for n, v in changes.items()}))
    )
    assert named in said and said.endswith("make the adapter yourself, and call replay_onto.")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_virtual_tokens": 10**9}, "num_virtual_tokens"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}, "prompt_tuning_init"),
        ({"tokenizer_name_or_path": "org/model"}, "tokenizer_name_or_path"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs"),
        ({"num_virtual_tokens": 4096, "token_dim": 1 << 20}, "it adds"),
        ({"peft_type": "PREFIX_TUNING", "prefix_projection": True, "encoder_hidden_size": 1 << 20}, "it adds"),
        ({"peft_type": "P_TUNING", "encoder_hidden_size": 1 << 20}, "it adds"),
        ({"peft_type": "P_TUNING", "encoder_num_layers": 10**9}, "encoder_num_layers"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "x.pt"}, "MULTITASK"),
        ({"peft_type": "CPT"}, "CPT"),
    ],
    ids=lambda value: f"{value!s:.40}",
)
def test_prompts_that_no_log_may_ask_for_are_refused_by_name(changes, named, stranger, honest):
    config = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS", "num_virtual_tokens": 4, **changes}
    said = refusal(lambda: rebuild_model(honest[0], stranger(adapter__config=config)))
    assert named in said and said.endswith("make the adapter yourself, and call replay_onto.")


def test_whole_modules_cannot_be_copied_without_limit(stranger, honest):
    """PEFT takes the ends of names, and each copy holds copies."""
    names = ["model", "layers", "self_attn", "mlp", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    refusal(lambda: rebuild_model(honest[0], stranger(adapter__config__modules_to_save=names)))


# ---- The base model ----


@pytest.mark.parametrize(
    "name",
    [
        *("PreTrainedModel", "AutoModelForCausalLM", "LlamaConfig", "LlamaModel", "TimmWrapperModel", "RagModel"),
        *("pipelines", "os", "models.llama", "__builtins__", "", "Trainer"),
    ],
)
def test_only_text_models_are_built(name, stranger, honest):
    assert "transformers has no such model" in refusal(
        lambda: rebuild_model(honest[0], stranger(base__architecture=name))
    )


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "BertForSequenceClassification"])
def test_models_of_another_kind_than_the_base_are_not_built(name, stranger, honest):
    """Whose sizes would be the defaults of their class: here, 671 billion numbers."""
    said = refusal(lambda: rebuild_model(honest[0], stranger(base__architecture=name)))
    assert 'is of another kind, "llama"' in said


def test_pickles_are_not_loaded(stranger, honest, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((Path(honest[0]) / "config.json").read_bytes())
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(OSError, match="it can not be loaded from safetensors") as caught:
        rebuild_model(str(base), stranger())
    assert "\n" not in str(caught.value) and not (tmp_path / "exploded").exists()


def test_a_folder_of_gguf_files_is_told_how_one_of_them_is_named(stranger, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("b.gguf", "a.gguf", "config.json"):
        (base / name).write_bytes(b"{}")
    with pytest.raises(OSError, match=r"no weights in safetensors; add the name of one of its GGUF files, /a\.gguf"):
        rebuild_model(str(base), stranger())


def test_adapters_beside_a_base_model_are_not_loaded(stranger, honest, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in Path(honest[0]).iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "there is an adapter in it" in refusal(lambda: rebuild_model(str(base), stranger()))


def test_what_a_log_leads_to_elsewhere_is_one_sentence(stranger, honest, tmp_path):
    with pytest.raises(OSError, match="it can not be loaded from safetensors") as caught:
        rebuild_model(str(tmp_path / "nowhere"), stranger())
    assert "\n" not in str(caught.value)
    refusal(lambda: rebuild_model(honest[0], stranger(adapter=None)))
    refusal(lambda: rebuild_model(honest[0], stranger(adapter__config__target_modules=["nowhere"])))
    refusal(lambda: rebuild_model(honest[0], stranger(adapter__config__target_modules=["layers"])))
    refusal(lambda: rebuild_model(honest[0], stranger(adapter__config__trainable_token_indices=[10**6])))


COMMIT = "0" * 40


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("org/name", COMMIT, ("org/name", COMMIT)),
        ("org/name/file.gguf", COMMIT, ("org/name/file.gguf", COMMIT)),
        ("package://hf_dpzo/model.gguf", None, ("package://hf_dpzo/model.gguf", None)),
        ("org/name", None, None),
        ("/etc", COMMIT, None),
        ("../up", COMMIT, None),
        ("a/b/c", COMMIT, None),
        ("org/../up", COMMIT, None),
        ("here/base", COMMIT, None),
        ("", COMMIT, None),
    ],
)
def test_a_log_may_name_a_base_on_the_hub_or_in_a_package(name, revision, expected, tmp_path, monkeypatch):
    (tmp_path / "here" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    header = {"base": {"name": name, "revision": revision}}
    if expected is not None:
        assert locate_base_model(header) == expected
    else:
        assert "name where it is here, as base" in refusal(lambda: locate_base_model(header))


def test_package_paths_stay_in_their_package(tmp_path, monkeypatch):
    package = tmp_path / "stranger_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit")
    (package / "inner.py").write_text("")
    (tmp_path / "outside").write_text("")
    (package / "link").symlink_to(tmp_path / "outside")
    monkeypatch.syspath_prepend(tmp_path)
    assert Path(resolve_path("package://stranger_package/inner.py")).is_file()
    for path in ("/../outside", "//etc/passwd", "/link", "/inner/../../outside"):
        with pytest.raises(ValueError, match="it leads out of the package"):
            resolve_path(f"package://stranger_package{path}")
    for name in ("stranger_package.inner", "..", ".", "", "__main__", "no-name", "stranger_package\\.."):
        with pytest.raises(ValueError, match="is not installed"):
            resolve_path(f"package://{name}/x")
    assert "stranger_package" not in sys.modules


# ---- Initial values ----


def damaged(values: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    name, value = next(iter(values.items()))
    return {
        "another name": {**values, "surprise": torch.zeros(1)},
        "a huge one": {**values, "surprise": torch.zeros(1).expand(10**6).clone()},
        "another shape": {**values, name: torch.zeros(3)},
        "another type": {**values, name: value.double()},
        "not finite": {**values, name: torch.full_like(value, math.nan)},
    }


@pytest.mark.parametrize("kind", ["another name", "a huge one", "another shape", "another type", "not finite"])
def test_initial_values_are_those_of_the_model(kind, stranger, honest):
    folder = stranger()
    save_file(damaged(load_file(folder / INITIAL_FILE))[kind], folder / INITIAL_FILE)
    said = refusal(lambda: rebuild_model(honest[0], folder))
    assert "that is not finite" in said if kind == "not finite" else "the model has no parameter" in said


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 8, struct.pack("<Q", MAX_TENSOR_HEADER_BYTES + 1) + b" " * 100, struct.pack("<Q", 2) + b"[]", None],
    ids=["empty", "endless", "large", "list", "cut"],
)
def test_damaged_initial_values_get_one_sentence(data, stranger, honest):
    path = stranger() / INITIAL_FILE
    path.write_bytes(path.read_bytes()[:-4] if data is None else data)
    said = refusal(lambda: rebuild_model(honest[0], path.parent))
    assert "it is damaged" in said or "no run's has so many" in said


# ---- The command ----


def test_the_command_refuses_strangers_in_one_line(stranger, honest, tmp_path, capsys):
    folder = stranger(adapter__config__megatron_core="os")
    assert main(["replay", honest[0], str(folder), "--output", str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err.rpartition("hf-dpzo: ")[2]
    assert said.count("\n") == 1 and 'adapter.LORA.megatron_core="os": no log may set it' in said
    assert not (tmp_path / "again").exists()


# ---- Chance ----


def test_flipped_and_lost_bytes_end_in_one_sentence_or_in_a_log(honest, tmp_path):
    """Checksums are made right again for half of them, as somebody would who means it."""
    data, draw = (honest[1] / LOG_FILE).read_bytes(), random.Random(0)
    log = Trajectory.read(honest[1])
    text = json.dumps(log.header).encode()
    for number in range(600):
        whole = bytearray(data if number % 2 else text)
        for _ in range(draw.randrange(1, 4)):
            whole[draw.randrange(len(whole))] = draw.randrange(256)
        part = bytes(whole[: draw.randrange(len(whole)) if draw.random() < 0.3 else None])
        if number % 2:
            (tmp_path / LOG_FILE).write_bytes(part)
        else:
            write_log(tmp_path, part, log.records, log.layout)
        try:
            assert len(Trajectory.read(tmp_path).records) <= 3
        except TrajectoryError as error:
            assert str(error).count("\n") == 0


ODD = [None, True, False, -1, 0, 1, 2**70, 10**300, 1.5, 1e308, "", "x", "../..", ".*", "\x00", [], [[]], {}, {"a": {}}]


def mutated(value, draw: random.Random):
    """`value` with one thing in it exchanged, dropped or added."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(sorted(value))
        changed = {**value, name: mutated(value[name], draw)}
        if draw.random() < 0.1:
            del changed[name]
        return changed | (
            {draw.choice(["x", "r", "seed", "", "__class__"]): draw.choice(ODD)} if draw.random() < 0.1 else {}
        )
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], mutated(value[place], draw), *value[place + 1 :]]
    return draw.choice(ODD)


def test_mutated_headers_end_in_one_sentence_or_in_a_log(honest, tmp_path):
    log, draw, read = Trajectory.read(honest[1]), random.Random(1), 0
    for _ in range(600):
        write_log(tmp_path, json.dumps(mutated(dict(log.header), draw)).encode(), log.records, log.layout)
        try:
            read += Trajectory.read(tmp_path).layout.record_size > 0
        except TrajectoryError as error:
            assert str(error).isprintable(), error
    assert read > 20  # Not everything is refused.


def test_mutated_adapters_end_in_one_sentence_or_in_a_configuration(honest):
    config, draw, made = Trajectory.read(honest[1]).header["adapter"]["config"], random.Random(2), 0
    for _ in range(600):
        given = mutated(dict(config), draw)
        try:
            made += build_adapter_config(given if isinstance(given, dict) else {}).peft_type == "LORA"
        except TrajectoryError as error:
            assert str(error).isprintable(), error
    assert made > 20


@pytest.mark.parametrize("tokens", [[], [-1], [2**31], ["5"], [5.5], [True], "5", [5] * 4097, {"5": 6}])
def test_a_log_may_not_name_an_invocation_that_no_row_holds(tokens):
    description = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 6]}
    assert build_adapter_config(description).alora_invocation_tokens == [5, 6]
    with pytest.raises(TrajectoryError, match=r"^adapter\.LORA\.alora_invocation_tokens"):
        build_adapter_config({**description, "alora_invocation_tokens": tokens})


@pytest.mark.parametrize(
    "name",
    ["ViTForImageClassification", "Wav2Vec2ForCTC", "WhisperForConditionalGeneration", "T5ForConditionalGeneration"],
)
def test_models_of_all_heads_are_known(name):
    assert name in MODELS


@pytest.mark.parametrize("name", ["TimmWrapperForImageClassification", "DPTForSemanticSegmentation"])
def test_models_with_parts_of_other_libraries_are_not_built(name):
    """A configuration names what they load, and it may be a stranger's."""
    assert name not in MODELS
