"""A stranger's folder: what a loader takes is what is verified, no link is followed, and no text breaks a reader."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType
from safetensors.torch import load_file, save_file

from hf_dpzo.card.repository import push_log
from hf_dpzo.card.upload import Destination
from hf_dpzo.cli.main import main
from hf_dpzo.io.files import LinkError
from hf_dpzo.verification.patterns import expand_selection, list_base_modules

from support.published import failing, rewrite


@pytest.fixture(scope="package")
def whole(runs) -> Path:
    return runs("all parameters")


@pytest.fixture
def tampered(whole, copied) -> Path:
    return copied(whole)


@pytest.fixture
def tampered_adapter(adapter, copied) -> Path:
    return copied(adapter)


# ---- What a loader takes ----


def shard(folder: Path) -> dict[str, str]:
    """Save the weights again as two files and an index, and return the map of the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, held in parts.items() for name in held}
    write_index(folder, places)
    return places


def write_index(folder: Path, places) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def zeros_elsewhere(folder: Path, file: str) -> None:
    """Save other weights of the same form into `file`."""
    (folder / file).parent.mkdir(exist_ok=True)
    tensors = load_file(next(iter(folder.glob("*model*.safetensors"))))
    save_file({name: value * 0 for name, value in tensors.items()}, folder / file, metadata={"format": "pt"})


def test_honest_shards_hold(tampered, base):
    shard(tampered)
    assert not failing(tampered, base)


@pytest.mark.parametrize("file", ["parts/w.safetensors", "../w.safetensors", "w.bin", "nothing.safetensors", 5, None])
def test_an_index_that_leads_elsewhere_is_named(tampered, base, file):
    places = shard(tampered)
    if file == "parts/w.safetensors":
        zeros_elsewhere(tampered, file)
    write_index(tampered, dict.fromkeys(places, file))
    assert "leads a loader to" in failing(tampered, base)["weights"]


@pytest.mark.parametrize("kind", ["swapped", "too few", "too many", "no map", "list"])
def test_an_index_that_is_wrong_about_its_files_is_named(tampered, base, kind):
    places = shard(tampered)
    first, second = sorted(set(places.values()))
    wrong = {
        "swapped": {name: {first: second, second: first}[file] for name, file in places.items()},
        "too few": {name: file for name, file in places.items() if name != min(places)},
        "too many": {**places, "more": first},
        "no map": {},
        "list": list(places),
    }
    write_index(tampered, wrong[kind])
    assert "index" in failing(tampered, base)["weights"]


@pytest.mark.parametrize("file", ["model.fp16.safetensors", "adapter_model.safetensors", "other.safetensors"])
def test_other_weights_beside_those_that_were_compared_are_named(tampered, base, file):
    zeros_elsewhere(tampered, file)
    assert f"{file}: a loader may take it" in failing(tampered, base)["weights"]


def test_an_index_beside_one_file_is_named(tampered, base):
    write_index(tampered, {"score.weight": "model.safetensors"})
    assert "model.safetensors.index.json: a loader may take it" in failing(tampered, base)["weights"]


def test_an_adapter_in_shards_is_named(tampered_adapter, base):
    """PEFT would load none of them."""
    (tampered_adapter / "adapter_model.safetensors").rename(
        tampered_adapter / "adapter_model-00001-of-00001.safetensors"
    )
    assert "a loader of adapters takes no other" in failing(tampered_adapter, base)["weights"]


def test_an_index_without_weights_is_named(tampered, base):
    """A log alone is fine, but a loader would take what the index names."""
    (tampered / "model.safetensors").unlink()
    zeros = {"score.weight": torch.zeros(1)}
    (tampered / "parts").mkdir()
    save_file(zeros, tampered / "parts" / "w.safetensors")
    write_index(tampered, dict.fromkeys(zeros, "parts/w.safetensors"))
    assert "leads a loader to" in failing(tampered, base)["weights"]


# ---- Configurations ----


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": r".*layers\.0\.self_attn\.q_proj"},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": r".*q_proj"},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"rank_pattern": {".*q_proj": 4}},
        {"alpha_pattern": {".*q_proj": 99}},
        {"modules_to_save": ["score", "embed_tokens"]},
        {"use_rslora": True},
        {"fan_in_fan_out": 1},
    ],
    ids=str,
)
def test_an_adapter_that_chooses_other_modules_is_named(tampered_adapter, base, change):
    rewrite(tampered_adapter / "adapter_config.json", lambda said: said.update(change))
    assert "adapter_config.json" in failing(tampered_adapter, base)["configuration"]


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r".*\.(q|v|k)_proj", "exclude_modules": r".*\.k_proj"},
        {"target_modules": [f"model.layers.{n}.self_attn.{k}_proj" for n in range(2) for k in "qv"]},
        {"alpha_pattern": {"no_such_module": 99}},
    ],
    ids=str,
)
def test_an_adapter_that_chooses_the_same_modules_in_other_words_holds(tampered_adapter, base, change):
    rewrite(tampered_adapter / "adapter_config.json", lambda said: said.update(change))
    assert not failing(tampered_adapter, base)


@pytest.mark.parametrize("pattern", ["(a|a)+" * 20 + "!", "(.*)*" * 8 + "!", "(", "x{1000000}{1000000}"])
def test_a_pattern_that_takes_too_long_is_named(tampered_adapter, base, pattern, monkeypatch):
    monkeypatch.setattr("hf_dpzo.verification.patterns.MAX_SECONDS", 1.0)
    rewrite(tampered_adapter / "adapter_config.json", lambda said: said.update(target_modules=pattern))
    assert "adapter_config.json" in failing(tampered_adapter, base)["configuration"]


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=r".*layers\.\d\.self_attn\.[qv]_proj"),
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=2,
            target_modules=["q_proj", "v_proj"],
            exclude_modules=r".*layers\.0.*q_proj",
            rank_pattern={r"layers\.0\..*": 3},
            alpha_pattern={r".*1\..*q_proj": 5, "q_proj": 3},  # In PEFT's files they are sorted, and the first counts.
        ),
    ],
    ids=["a pattern", "several patterns"],
)
def test_honest_runs_whose_adapter_was_chosen_by_patterns_hold(train, base, adapter):
    folder = train(lora=True, adapter=adapter)
    assert not failing(folder, base)


def test_what_is_expanded_is_what_peft_made(adapter, base):
    config = json.loads((adapter / "adapter_config.json").read_text())
    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=2)
    names = list_base_modules(model)
    assert set(expand_selection(config, names)["target_modules"]) == set(model.base_model.targeted_module_names)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": None},
        {"rms_norm_eps": None},
        {"num_key_value_heads": None},
        {"layer_types": ["sliding_attention"]},
        {"transformers_weights": "other.safetensors"},
        {"quantization_config": {"quant_method": "awq"}},
        {"attention_bias": 0},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_a_configuration_that_a_loader_reads_otherwise_is_named(tampered, base, change):
    rewrite(tampered / "config.json", lambda said: said.update(change))
    assert "config.json" in failing(tampered, base)["configuration"]


def test_a_field_that_is_missing_has_the_value_that_a_loader_gives_it(tampered, base):
    said = json.loads((tampered / "config.json").read_text())
    assert said["pad_token_id"] is not None and said["attention_bias"] is False
    rewrite(tampered / "config.json", lambda said: said.pop("attention_bias"))
    assert not failing(tampered, base)
    rewrite(tampered / "config.json", lambda said: said.pop("pad_token_id"))
    assert "pad_token_id" in failing(tampered, base)["configuration"]


def test_a_configuration_beside_a_log_alone_is_compared_too(tampered, base):
    (tampered / "model.safetensors").unlink()
    rewrite(tampered / "config.json", lambda said: said.update(transformers_weights="initial.safetensors"))
    assert "transformers_weights" in failing(tampered, base)["configuration"]


# ---- Links ----


def notes(tmp_path: Path) -> Path:
    """A file of the reader's."""
    (tmp_path / "notes.txt").write_text("the reader's own")
    return tmp_path / "notes.txt"


@pytest.mark.parametrize("name", ["README.md", "privacy.json", "trajectory.zo", "initial.safetensors"])
@pytest.mark.parametrize("command", ["card", "push-log"])
def test_links_are_neither_read_for_a_card_nor_for_an_upload(tampered, tmp_path, name, command, hub, capsys):
    own = notes(tmp_path)
    (tampered / name).unlink(missing_ok=True)
    (tampered / name).symlink_to(own)
    assert main([command, str(tampered), *(["tester/x"] if command == "push-log" else [])]) == 2
    said = capsys.readouterr().err
    assert name in said and said.count("\n") == 1
    assert own.read_text() == "the reader's own" and not any("/commit/" in request for request in hub.requests)


def test_a_link_is_not_uploaded_from_python(tampered, tmp_path):
    (tampered / "initial.safetensors").unlink(missing_ok=True)
    (tampered / "initial.safetensors").symlink_to(notes(tmp_path))
    with pytest.raises(LinkError, match="it is a link"):
        push_log(tampered, Destination(repository="tester/x"))


@pytest.mark.parametrize("name", ["README.md.new", "privacy.json.new", "training.png"])
def test_links_beside_a_card_are_not_written_through(tampered, tmp_path, name):
    own = notes(tmp_path)
    (tampered / name).unlink(missing_ok=True)
    (tampered / name).symlink_to(own)
    assert main(["card", str(tampered)]) == 0
    assert own.read_text() == "the reader's own"


def test_a_folder_that_is_verified_may_hold_links(tampered, base, tmp_path):
    """The Hub's client keeps files as links to where they really are."""
    for path in [path for path in tampered.iterdir() if path.is_file()]:
        shutil.move(path, tmp_path / f"blob-{path.name}")
        path.symlink_to(tmp_path / f"blob-{path.name}")
    assert not failing(tampered, base)


@pytest.mark.parametrize("name", ["trajectory.zo", "trajectory.zo.lock", "model.safetensors", "checkpoint-20"])
def test_training_does_not_begin_where_it_would_write_through_a_link(train, tmp_path, name):
    own = notes(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(own)
    with pytest.raises(ValueError, match="it is a link"):
        train(lora=True, output_dir=str(tmp_path / "out"))
    assert own.read_text() == "the reader's own"


def test_a_replay_does_not_save_through_a_link(adapter, base, tmp_path, capsys):
    own = notes(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").symlink_to(own)
    assert main(["replay", str(base), str(adapter), "--output", str(tmp_path / "out")]) == 2
    assert own.read_text() == "the reader's own" and "it is a link" in capsys.readouterr().err


# ---- Texts ----


HEADS = [
    *(f"license: !<{tag}> {value}" for tag in yaml.SafeLoader.yaml_constructors if tag for value in ("x", '""')),
    *("eval_results: 3", "language: 3", "x: y", "1: a\n1.0: b", "z: !!set {a, b}", "ignore_metadata_errors: 3"),
    *("to_yaml: x", "to_dict: x", "get: 1", "__class__: x", f"n: {'9' * 5000}", f"n: 0x{'f' * 30_000}", "n: 1e999"),
    *("d: 2024-13-45", "base_model: [1, {a: b}]", "widget: !!binary x", "\n" * 60_000 + "a: b", "? [a, b]\n: c"),
    *("model-index: 3", "model-index: [{name: 3, results: 4}]", "differential_privacy: 3", "pipeline_tag: [x]"),
]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head!r:.50}")
def test_metadata_that_no_reader_expects_end_in_a_finding_or_in_a_card(tampered, head, capsys):
    card = tampered / "README.md"
    text = card.read_text()
    for begin in ("---\n", f"---\n{head}\n"):
        card.write_text(text.replace("---\n", begin, 1))
        assert main(["verify", str(tampered), "--without-weights"]) in (1, 3)
    assert main(["card", str(tampered)]) == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err and max(map(len, said.out.splitlines())) < 500


@pytest.mark.parametrize("tags", ["3", "[3]", "[[a]]", "{a: b}", "differential-privacy", "[differential-privacy, 3]"])
def test_tags_of_any_form_are_read(tampered, tags):
    card = tampered / "README.md"
    front, _, rest = card.read_text().removeprefix("---\n").partition("\n---\n")
    kept = {name: value for name, value in yaml.safe_load(front).items() if name != "tags"}
    card.write_text(f"---\n{yaml.safe_dump(kept)}tags: {tags}\n---\n{rest}")
    assert main(["verify", str(tampered), "--without-weights"]) in (1, 3)
    assert main(["card", str(tampered)]) == 0
    assert main(["verify", str(tampered), "--without-weights"]) == 3


@pytest.mark.parametrize(
    "name",
    ["x; echo pwned #", 'x"); import os #', "x\n", "--without-weights", "$(x)", "a b", "a/b/c", "../x", "ä/b", "`x`"],
)
def test_a_repository_that_is_no_name_does_not_reach_a_command(tampered, name, capsys):
    rewrite(tampered / "privacy.json", lambda said: said["reproducibility"].update(repository=name))
    assert main(["verify", str(tampered), "--without-weights"]) == 1
    assert "reproducibility.repository" in capsys.readouterr().out
    main(["card", str(tampered)])
    assert f"verify {name}" not in (tampered / "README.md").read_text()


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (("evaluation", "metrics"), {"eval_loss": 10**400}),
        (("validity_checks", "numerical_isolation", "bound_in_clip_norms"), 10**400),
        (("training", "hyperparameters"), {"learning_rate": 10**400}),
        (("training", "hyperparameters"), {"a\n": 1}),
        (("versions",), {"x": "**y**"}),
        (("versions",), {"x": "1\n"}),
        (("training", "task"), "x\n"),
    ],
    ids=str,
)
def test_values_that_no_statement_has_are_named(tampered, part, value, capsys):
    def change(said):
        for name in part[:-1]:
            said = said[name]
        said[part[-1]] = value

    rewrite(tampered / "privacy.json", change)
    assert main(["verify", str(tampered), "--without-weights"]) == 1
    assert "privacy.json" in capsys.readouterr().out
    assert main(["card", str(tampered)]) == 0


@pytest.mark.parametrize("name", ["\x1b[2J.json", "\udcff.txt", "a\nb.md", "\u202e.txt"])
def test_names_of_files_cannot_move_the_cursor(tampered, name, capsys):
    (tampered / name).write_text("")
    main(["verify", str(tampered), "--without-weights"])
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines())


def test_weights_of_types_that_torch_does_not_have_are_a_finding(tampered, base):
    path = tampered / "model.safetensors"
    header = {"score.weight": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert "weights" in failing(tampered, base)


def test_a_pipe_in_a_folder_keeps_nobody_waiting(tampered):
    for name in ("privacy.json", "README.md"):
        (tampered / name).unlink()
        os.mkfifo(tampered / name)
    assert main(["verify", str(tampered), "--without-weights"]) == 1
    assert main(["card", str(tampered)]) == 2
