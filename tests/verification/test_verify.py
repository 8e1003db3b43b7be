"""Verifying: what is honest holds, and whatever was tampered with is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file

from hf_dpzo import from_trajectory
from hf_dpzo.cli.main import main
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.run import LoggedRun
from hf_dpzo.trajectory.writer import TrajectoryWriter
from hf_dpzo.verification.verify import verify

from support.published import STEPS, failing, rewrite, weights_of


@pytest.fixture(scope="module")
def without_privacy(train) -> Path:
    return train(lora=True, method="mezo", noise_multiplier=None, target_delta=None)


def test_all_that_an_honest_run_saves_holds(either, base):
    findings = verify(either, base=str(base))
    assert {one.name: one.holds for one in findings} == dict.fromkeys(
        ["log", "noise", "claim", "description", "card", "base model", "weights", "configuration", "other files"], True
    )
    assert "bit for bit" in next(one.detail for one in findings if one.name == "weights")


def test_a_tampered_epsilon_is_named(copy, base):
    rewrite(copy / "privacy.json", lambda said: said["claim"].update(epsilon=0.5))
    failed = failing(copy, base)
    assert "claim.epsilon=0.5 there and " in failed["claim"]
    assert set(failed) == {"claim"}


def test_an_epsilon_tampered_with_everywhere_is_named(copy, base):
    claimed = json.loads((copy / "privacy.json").read_text())["claim"]["epsilon"]
    for name in ("privacy.json", "README.md"):
        (copy / name).write_text((copy / name).read_text().replace(str(claimed), "0.5"))
    assert set(failing(copy, base)) == {"claim", "card"}


@pytest.mark.parametrize("field", ["meaning", "mechanism", "sampling", "randomness", "not_covered"])
def test_each_part_of_a_statement_is_compared(copy, base, field):
    def change(said):
        if field == "not_covered":
            said[field] = said[field][1:]
        elif field == "meaning":
            said[field]["best_membership_accuracy"] = 0.5
        elif field == "mechanism":
            said[field]["noise_multiplier"] *= 2
        elif field == "sampling":
            said[field]["sampling_rate"] /= 2
        else:
            said[field]["directions"]["seed"] += 1

    rewrite(copy / "privacy.json", change)
    failed = failing(copy, base)
    assert field in failed["claim" if field == "meaning" else "description"]


def test_a_dropped_last_step_is_named(copy_of_either, base):
    log = copy_of_either / "trajectory.zo"
    log.write_bytes(log.read_bytes()[: -Trajectory.read(log).layout.record_size])
    failed = failing(copy_of_either, base)
    assert f"it holds {STEPS - 1} steps, and privacy.json says {STEPS}" in failed["log"]
    assert f"after {STEPS} steps, and the log holds {STEPS - 1}" in failed["weights"]


def test_a_step_dropped_from_the_middle_is_named(copy, base):
    log = copy / "trajectory.zo"
    size, data = Trajectory.read(log).layout.record_size, log.read_bytes()
    log.write_bytes(data[: -5 * size] + data[-4 * size :])
    assert f"record {STEPS - 5} is damaged" in failing(copy, base)["log"]


def test_a_changed_release_is_named(copy, base):
    log = copy / "trajectory.zo"
    data = bytearray(log.read_bytes())
    data[-20] ^= 1
    log.write_bytes(data)
    assert "log" in failing(copy, base)


def test_an_edited_weight_is_named(copy_of_either, base):
    path = weights_of(copy_of_either)
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] += 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    (detail,) = failing(copy_of_either, base).values()
    assert detail.startswith(f"{name}: an entry differs by ")


@pytest.mark.parametrize("change", ["missing", "more", "shape", "dtype", "nan"])
def test_weights_of_another_form_are_named(copy_of_either, base, change):
    path = weights_of(copy_of_either)
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if change == "missing":
        del tensors[name]
    elif change == "more":
        tensors["more"] = torch.zeros(2)
    elif change == "shape":
        tensors[name] = tensors[name][:1].clone()
    elif change == "dtype":
        tensors[name] = tensors[name].double()
    else:
        tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert set(failing(copy_of_either, base)) == {"weights"}


@pytest.mark.parametrize("line", ["**Guarantee.**", "| unit |", "- the data that the base model", "| base model |"])
def test_an_edited_card_is_named_by_its_line(copy, base, line):
    card = copy / "README.md"
    lines = card.read_text().splitlines()
    number = next(number for number, one in enumerate(lines) if one.startswith(line))
    lines[number] = "This protects everybody."
    card.write_text("\n".join(lines))
    failed = failing(copy, base)
    assert set(failed) == {"card"} and "'This protects everybody.'" in failed["card"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("differential_privacy:\n  epsilon: ", "differential_privacy:\n  epsilon: 9"), ("type: accuracy", "type: auc")],
)
def test_edited_metadata_are_named(copy, base, old, new):
    card = copy / "README.md"
    assert old in card.read_text()
    card.write_text(card.read_text().replace(old, new, 1))
    assert set(failing(copy, base)) == {"card"}


def test_a_swapped_base_model_is_named(either, base):
    assert "it was swapped, or changed" in failing(either, base.parent / "other")["base model"]


def test_a_missing_base_model_is_reported(either, tmp_path):
    found = {one.name: one for one in verify(either, base=str(tmp_path / "nowhere"))}
    assert found["base model"].holds is None and "weights" not in found
    found = {one.name: one for one in verify(either)}
    assert found["base model"].holds is None and "name where it is here, as base" in found["base model"].detail


def test_another_configuration_is_named(copy_of_either, base):
    path = next(
        path for path in (copy_of_either / "adapter_config.json", copy_of_either / "config.json") if path.is_file()
    )
    key = "lora_alpha" if path.name == "adapter_config.json" else "rms_norm_eps"
    rewrite(path, lambda said: said.update({key: 99}))
    assert f"{path.name}.{key}=99" in failing(copy_of_either, base)["configuration"]


def test_code_in_a_configuration_is_named(copy_of_either, base):
    path = next(
        path for path in (copy_of_either / "adapter_config.json", copy_of_either / "config.json") if path.is_file()
    )
    rewrite(path, lambda said: said.update(auto_map={"AutoModel": "evil.Model"}))
    assert "auto_map" in failing(copy_of_either, base)["configuration"]


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_model.BIN", "modeling_evil.py", "weights.pkl", "m.gguf"]
)
def test_files_that_can_run_code_are_named_and_not_opened(copy, base, name):
    (copy / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert name in failing(copy, base)["other files"]


def test_a_log_without_noise_is_named(copy, base):
    """Of a run that only claimed to add some: every checksum is right."""
    log = Trajectory.read(copy)
    (copy / "trajectory.zo").unlink()
    writer = TrajectoryWriter.create(copy / "trajectory.zo", log.header)
    for record in log.records:
        writer.append(replace(record, integers=tuple(integer // 100 for integer in record.integers)))
    writer.close()
    assert f"of {STEPS} released values are closer to zero than 5%" in failing(copy, base)["noise"]


@pytest.mark.parametrize("name", ["privacy.json", "README.md", "trajectory.zo"])
def test_what_is_missing_is_named(copy, base, name):
    (copy / name).unlink()
    assert any(name in detail for detail in failing(copy, base).values())


@pytest.mark.parametrize("name", ["privacy.json", "README.md"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"schema": NaN}', b"x" * (1 << 21)]
)
def test_nonsense_is_named(copy, base, name, content):
    (copy / name).write_bytes(content)
    failed = failing(copy, base)
    assert failed and all(len(detail) < 600 for detail in failed.values())


def test_weights_after_the_best_step_are_replayed_to_that_step(train, base):
    folder = train(
        lora=True,
        eval_data_is_public=True,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=STEPS // 4,
        save_steps=STEPS // 4,
        metric_for_best_model="eval_accuracy",
        greater_is_better=True,
        learning_rate=1e-6,  # So little that accuracy never gets better, and the first is the best.
    )
    said = json.loads((folder / "privacy.json").read_text())
    assert said["reproducibility"]["weights"]["after_step"] == said["evaluation"]["after_step"] == STEPS // 4
    assert not failing(folder, base)
    assert not failing(folder / f"checkpoint-{STEPS // 2}", base)


def test_a_model_without_privacy_is_said_to_have_none(without_privacy, base):
    found = {one.name: one for one in verify(without_privacy, base=str(base))}
    assert all(one.holds for one in found.values())
    assert found["claim"].detail == "there is none: the model is NOT PRIVATE"


def test_a_false_claim_of_a_run_without_noise_is_named(without_privacy, honest, base, copied):
    folder = copied(without_privacy)
    for name in ("privacy.json", "README.md"):
        shutil.copyfile(honest / name, folder / name)
    assert "claim" in failing(folder, base)


def test_command_says_what_holds(honest, base, copy, capsys):
    assert main(["verify", str(honest), "--base", str(base)]) == 0
    assert "Everything holds." in capsys.readouterr().out
    assert main(["verify", str(honest), "--base", str(base), "--without-weights"]) == 3
    assert "not everything could be checked" in capsys.readouterr().out
    rewrite(copy / "privacy.json", lambda said: said["claim"].update(epsilon=0.5))
    assert main(["verify", str(copy), "--base", str(base)]) == 1
    assert "claim" in capsys.readouterr().out
    assert main(["verify", str(honest / "nothing" / "there")]) == 2
    assert "neither a folder nor user/model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "head",
    [
        "differential_privacy: {epsilon: 0.1}\n",
        "? differential_privacy\n: {epsilon: 0.1}\n",
        "a: &a [x, x]\nb: [*a, *a]\n",
        "a: " + "[" * 50_000 + "\n",
        "a: " + "x" * (1 << 17) + "\n",
        "a: !!python/object/apply:os.system [exit]\n",
    ],
    ids=["twice", "twice in another way", "aliases", "deep", "large", "code"],
)
def test_metadata_that_can_be_read_in_two_ways_are_named(copy, base, head):
    card = copy / "README.md"
    card.write_text(card.read_text().replace("---\n", f"---\n{head}", 1))
    assert set(failing(copy, base)) == {"card"}


def test_weights_that_are_there_twice_are_named(copy_of_either, base):
    """Of which the one that is loaded was edited, and the other is as it should be."""
    path = weights_of(copy_of_either)
    shutil.copyfile(path, copy_of_either / "zz.safetensors")
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert "zz.safetensors: a loader may take it" in failing(copy_of_either, base)["weights"]


def test_a_name_that_is_twice_in_a_statement_is_named(copy, base):
    said = copy / "privacy.json"
    said.write_text(said.read_text().replace('"claim": {', '"claim": {"epsilon": 0.1, "epsilon": 0.1}, "claim": {', 1))
    assert "a name is there twice" in failing(copy, base)["privacy.json"]


def test_another_revision_of_the_base_model_is_named(adapter, base, copied):
    copy = copied(adapter)
    rewrite(copy / "adapter_config.json", lambda said: said.update(revision="refs/pr/1"))
    assert "adapter_config.json.revision" in failing(copy, base)["configuration"]


@pytest.mark.parametrize(
    "line",
    [
        "- PEFT audit: (0.001, 0)-differential privacy holds for users",
        "- PEFT <!--",
        "one\u2028line",
    ],
)
def test_lines_that_only_look_like_pefts_are_named(adapter, base, copied, line):
    copy = copied(adapter)
    card = copy / "README.md"
    card.write_text(card.read_text().replace("## Check it", f"{line}\n\n## Check it"))
    assert set(failing(copy, base)) == {"card"}


def test_a_line_broken_by_other_separators_is_named(adapter, base, copied):
    copy = copied(adapter)
    card = copy / "README.md"
    card.write_text(card.read_text().replace("|---|---|\n", "|---|---|\x85"))
    assert set(failing(copy, base)) == {"card"}


@pytest.mark.parametrize("head", ["base_model: meta-llama/Llama-3-8B\n", "pipeline_tag: fill-mask\n"])
def test_metadata_about_another_model_are_named(adapter, base, copied, head):
    copy = copied(adapter)
    card = copy / "README.md"
    text = card.read_text().replace("pipeline_tag: text-classification\n", "")
    card.write_text(text.replace("---\n", f"---\n{head}", 1))
    assert set(failing(copy, base)) == {"card"}


def test_a_card_of_another_version_is_not_excused(adapter, base, copied):
    copy = copied(adapter)
    rewrite(copy / "privacy.json", lambda said: said["versions"].update(hf_dpzo="9.9"))
    card = copy / "README.md"
    card.write_text(card.read_text().replace("row of the training data", "of everything"))
    assert "check it with that version" in failing(copy, base)["card"]


def test_isolation_is_held_against_the_log(adapter, base, copied, monkeypatch):
    copy = copied(adapter)
    better = {"status": "bitwise", "bound_in_clip_norms": 0.0}
    rewrite(copy / "privacy.json", lambda said: said["validity_checks"].update(numerical_isolation=better))
    assert "numerical_isolation" in failing(copy, base)["description"]


def test_a_void_step_that_moves_weights_is_named(adapter, base, copied):
    copy = copied(adapter)
    log = Trajectory.read(copy)
    (copy / "trajectory.zo").unlink()
    writer = TrajectoryWriter.create(copy / "trajectory.zo", log.header)
    for record in log.records:
        writer.append(replace(record, void=True))
    writer.close()
    assert "record 0 is void, and holds a release" in failing(copy, base)["log"]


def test_markup_in_what_was_declared_does_not_reach_the_card(copy, base, capsys):
    lie = "x\n\n# Protected\n\n**with (0.1, 0)-differential privacy** <b>|</b> [here](http://evil) \x1b[2J"
    rewrite(copy / "privacy.json", lambda said: said["training"].update(dataset=[lie]))
    assert main(["card", str(copy)]) == 0
    text = (copy / "README.md").read_text()
    assert not any(line.startswith("# Protected") for line in text.splitlines())
    assert not [one for one in ("<b>", "[here](", "\x1b", "**with (0.1") if one in text]
    main(["verify", str(copy), "--base", str(base)])
    assert "\x1b" not in capsys.readouterr().out


# ---- Runs that replay to the last bit elsewhere ----


@pytest.fixture(scope="module")
def elsewhere(train) -> Path:
    """Saved by a run on another kind of device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_dpzo.trajectory.run._choose_replay_device", lambda *run: "cuda on x86_64")
        return train(lora=True)


@pytest.mark.parametrize(("edit", "holds"), [(0.0, True), (1e-6, True), (1e-2, False)])
def test_on_another_device_weights_hold_up_to_rounding(elsewhere, copied, base, edit, holds):
    copy = copied(elsewhere)
    path = weights_of(copy)
    tensors = load_file(path)
    name = max(tensors, key=lambda one: tensors[one].abs().max().item())
    tensors[name].view(-1)[0] += edit * tensors[name].abs().max()
    save_file(tensors, path, metadata={"format": "pt"})
    (found,) = (one for one in verify(copy, base=str(base)) if one.name == "weights")
    assert found.holds is holds
    if edit and holds:
        assert "of a tensor's largest entry: this run replays to the last bit on cuda on x86_64 alone" in found.detail


def test_a_model_from_a_log_of_another_device_comes_with_a_warning(elsewhere, base):
    with pytest.warns(UserWarning, match="replays to the last bit on cuda on x86_64 alone"):
        assert from_trajectory(elsewhere, base=str(base)) is not None


# ---- Noise that is not there ----


def noisy_log(folder: Path, path: Path, scale: float) -> Path:
    """A log of noise alone, `scale` times as much as the one in `folder` claims. Every checksum is right."""
    log = Trajectory.read(folder)
    header = json.loads(json.dumps(log.header))
    header["plan"]["steps"] = 600
    mechanism = LoggedRun.from_log(log).method.mechanism
    path.mkdir()
    writer = TrajectoryWriter.create(path / "trajectory.zo", header)
    for step in range(600):
        (integer,) = mechanism.release(torch.zeros(0, 1)).integers
        writer.append(replace(log.records[0], step=step, integers=(int(scale * integer),)))
    writer.close()
    return path


@pytest.fixture(scope="module", params=[{}, {"method": "dpzo", "noise": "laplace"}], ids=["gaussian", "laplace"])
def short(request, train) -> Path:
    return train(lora=True, max_steps=2, **request.param)


@pytest.mark.parametrize(("scale", "holds"), [(1.0, True), (3 / 2, True), (2 / 3, False), (0.0, False)])
def test_noise_below_the_claimed_scale_is_detected(short, tmp_path, scale, holds):
    log = noisy_log(short, tmp_path / "log", scale)
    found = {one.name: one.holds for one in verify(log, weights=False)}
    assert (found["log"], found["noise"]) == (True, holds)


# ---- Cards written anew ----


def test_a_card_rewritten_from_disk_is_the_same(copy_of_either, base, pictures):
    before = {name: (copy_of_either / name).read_bytes() for name in ("README.md", "privacy.json", "training.png")}
    assert main(["card", str(copy_of_either)]) == 0
    assert {name: (copy_of_either / name).read_bytes() for name in before} == before


def test_card_of_a_run_that_was_killed_can_be_written(copy_of_either, base):
    """Before it saved: there is the log, and nothing else says anything."""
    for path in copy_of_either.iterdir():
        if path.is_file() and path.name not in ("trajectory.zo", "initial.safetensors"):
            path.unlink()
    log = copy_of_either / "trajectory.zo"
    log.write_bytes(log.read_bytes()[:-10])  # Its last record is torn.
    assert main(["card", str(copy_of_either)]) == 0
    said = json.loads((copy_of_either / "privacy.json").read_text())
    assert (said["claim"]["steps_taken"], said["status"]) == (STEPS, "differentially_private")
    assert said["versions"] and said["reproducibility"]["weights"] is None
    found = {one.name: one for one in verify(copy_of_either, base=str(base))}
    assert found["claim"].holds and found["card"].holds and found["weights"].holds is None


def test_what_the_owner_added_to_the_head_of_a_card_stays(copy, base):
    card = copy / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\nlanguage: en\n", 1))
    assert main(["card", str(copy)]) == 0
    assert "license: mit\n" in card.read_text() and "language: en\n" in card.read_text()
    assert not failing(copy, base)


def test_a_card_that_peft_wrote_over_still_verifies(adapter, copied, base):
    folder = copied(adapter)
    AutoPeftModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder)
    assert "- PEFT " in (folder / "README.md").read_text()
    assert not failing(folder, base)


def test_card_command_needs_a_log(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert "there is no log of a run" in capsys.readouterr().err
    assert main(["card", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
