"""From a base model and a log to weights, and what does not lead there."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import (
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding

from hf_dpzo import ZOTrainer, replay_onto, seeded_peft_model
from hf_dpzo.cli.main import main
from hf_dpzo.models.seeded import publicly_seeded
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import INITIAL_FILE as INITIAL
from hf_dpzo.trajectory.log import LOG_FILE, Trajectory
from hf_dpzo.trajectory.replay import check_device, rebuild_model
from hf_dpzo.trajectory.run import ANYWHERE

from support.models import classifier
from support.recipes import refused, table
from support.rows import labelled_rows


@pytest.fixture
def train(make_args, tokenizer):
    def run(model=None, **changes) -> ZOTrainer:
        torch.manual_seed(0)
        trainer = ZOTrainer(
            model=model or classifier(),
            args=make_args(**changes),
            train_dataset=labelled_rows(20),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        return trainer

    return run


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def rebuilt_from(base: torch.nn.Module, trainer: ZOTrainer, at_step=None) -> torch.nn.Module:
    model = copy.deepcopy(base)
    replay_onto(model, Trajectory.read(trainer.args.output_dir), at_step=at_step)
    return model


# ---- The command ----


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_command_rebuilds_what_training_saved(adapter, write, workplace, capsys):
    recipe = write(adapter=adapter, save_strategy="steps", save_steps=1, max_steps=3)
    assert main(["train", recipe]) == 0
    base, out, again = (str(workplace / name) for name in ("causal", "out", "again"))
    name = "adapter_model.safetensors" if adapter == "lora" else "model.safetensors"
    for step, saved in ((None, "out"), (2, "out/checkpoint-2")):
        steps = [] if step is None else ["--at-step", str(step)]
        assert main(["replay", base, out, "--output", again, *steps]) == 0
        assert (workplace / "again" / name).read_bytes() == (workplace / saved / name).read_bytes()
        said = table(capsys.readouterr().out)
        assert said["steps replayed"] == f"{step or 3} of 3, planned 3"
        assert said["bytes of a step"] == "64"
    assert not (workplace / "out" / INITIAL).exists()  # The recipe's seed gives the adapter back.


def test_a_run_on_the_command_line_goes_on(write, workplace, capsys):
    recipe = write(max_steps=4)
    assert main(["train", recipe]) == 0
    log = workplace / "out" / LOG_FILE
    whole = log.read_bytes()
    log.write_bytes(whole[: -2 * 64])
    assert refused(capsys, "train", recipe).endswith("or choose another folder for a new one.\n")
    assert main(["train", recipe, "--resume_from_checkpoint", "true"]) == 0
    assert log.read_bytes()[: -2 * 64] == whole[: -2 * 64]
    assert len(Trajectory.read(log).records) == 4


def test_bad_replays_get_one_sentence(write, workplace, capsys):
    assert main(["train", write()]) == 0
    base, out, again = (str(workplace / name) for name in ("causal", "out", "again"))
    assert "there is no log of a run" in refused(capsys, "replay", base, base, "--output", again)
    assert "at_step=9: the log has 2 steps" in refused(capsys, "replay", base, out, "--output", again, "--at-step", "9")
    masked = str(workplace / "masked")
    assert refused(capsys, "replay", masked, out, "--output", again)
    assert not Path(again).exists()


def test_replays_do_not_overwrite_a_run(write, workplace, capsys):
    assert main(["train", write()]) == 0
    base, out = str(workplace / "causal"), str(workplace / "out")
    assert "it holds the log of a run" in refused(capsys, "replay", base, out, "--output", out)


def test_stopping_the_command_line_says_how_to_go_on(write, capsys, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(ZOTrainer, "training_step", interrupted)
    assert main(["train", write()]) == 130
    assert "--resume_from_checkpoint true goes on" in capsys.readouterr().err


# ---- The start ----


def test_adapters_from_a_public_seed_are_rebuilt_from_the_log_alone(train, tmp_path):
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj", "v_proj"])
    trainer = train(seeded_peft_model(classifier(), config, seed=7))
    folder = Path(trainer.args.output_dir)
    assert Trajectory.read(folder).header["adapter"]["seed"] == 7
    assert not [
        name for name in load_file(folder / INITIAL) if "lora" in name
    ]  # The head alone, of which nobody knows.
    torch.manual_seed(0)
    classifier().save_pretrained(tmp_path / "base")
    assert same(rebuild_model(str(tmp_path / "base"), folder), trainer.model)


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"task_type": TaskType.SEQ_CLS, "r": 2, "target_modules": ["q_proj", "v_proj"], **changes})


# Each kind of adapter that a log may ask for, and each key that may differ from its default.
ADAPTERS = {
    "lora": lora(),
    "lora on the default modules": lora(target_modules=None),
    "lora on all linear modules": lora(target_modules="all-linear"),
    "lora by a pattern": lora(target_modules=r".*\.1\..*(q|v)_proj"),
    "lora but for a pattern": lora(exclude_modules=r".*\.0\..*"),
    "lora but for a module": lora(exclude_modules=["layers.0.self_attn.q_proj"]),
    "lora in one layer": lora(layers_to_transform=1, layers_pattern="layers"),
    "lora in layers by a pattern": lora(layers_to_transform=[0], layers_pattern=["lay.*"]),
    "lora on embeddings": lora(target_modules=["embed_tokens"]),
    "lora with ranks by a pattern": lora(rank_pattern={"v_.*": 4}, alpha_pattern={r".*\.0\..*": 3.5}),
    "lora with ranks in order": lora(rank_pattern={"q_proj": 1, "0.self_attn.q_proj": 3, "v_proj": 4}),
    "lora with whole modules": lora(modules_to_save=["norm"]),
    "lora with tokens": lora(trainable_token_indices=[3, 5]),
    "lora with tokens of a layer": lora(trainable_token_indices={"embed_tokens": [3]}),
    "lora on parameters": lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
    "lora with biases": lora(bias="all", lora_bias=True, lora_dropout=0.1, init_lora_weights=False),
    "rslora": lora(use_rslora=True, lora_alpha=3, init_lora_weights="gaussian"),
    "dora": lora(use_dora=True),
    "ia3": IA3Config(task_type=TaskType.SEQ_CLS),
    "ia3 on all linear modules": IA3Config(task_type=TaskType.SEQ_CLS, target_modules="all-linear"),
    "ia3 by patterns": IA3Config(
        task_type=TaskType.SEQ_CLS, target_modules=".*(k|down)_proj", feedforward_modules=".*down_proj"
    ),
    "ia3 at random": IA3Config(
        task_type=TaskType.SEQ_CLS,
        target_modules=["k_proj", "up_proj"],
        feedforward_modules=["up_proj"],
        init_ia3_weights=False,
    ),
    "norms": LNTuningConfig(task_type=TaskType.SEQ_CLS, target_modules=["norm", "input_layernorm"]),
    "norms by a pattern": LNTuningConfig(task_type=TaskType.SEQ_CLS, target_modules=".*norm"),
    "prompt": PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3),
    "prompt of words": PromptTuningConfig(
        task_type=TaskType.SEQ_CLS, num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"
    ),
    "encoded prompt": PromptEncoderConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3, encoder_hidden_size=8),
    "encoded prompt, recurrent": PromptEncoderConfig(
        task_type=TaskType.SEQ_CLS,
        num_virtual_tokens=3,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=8,
        encoder_num_layers=1,
    ),
    "prefix": PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3),
    "prefix, projected": PrefixTuningConfig(
        task_type=TaskType.SEQ_CLS, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=4
    ),
    "prefix of zeros": PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3, init_weights="zero"),
}


# Of modules that PEFT can not merge an adapter into.
@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:.lora_bias=True. was passed")
@pytest.mark.parametrize(
    ("name", "seeded"),
    [*((name, True) for name in ADAPTERS), *((name, False) for name in ("lora", "ia3 at random", "norms", "prefix"))],
)
def test_every_adapter_that_a_log_may_ask_for_is_rebuilt(name, seeded, train, tmp_path):
    torch.manual_seed(0)
    base, config = classifier(), copy.deepcopy(ADAPTERS[name])
    base.save_pretrained(tmp_path / "base")
    model = seeded_peft_model(base, config, seed=7) if seeded else get_peft_model(base, config)
    # Without privacy, for a prefix lets the length of a batch move losses a little, and private runs refuse that.
    trainer = train(model, method="mezo", noise_multiplier="absent", target_delta="absent", max_steps=2)
    rebuilt = rebuild_model(str(tmp_path / "base"), trainer.args.output_dir)
    assert same(rebuilt, trainer.model)
    assert not same(rebuild_model(str(tmp_path / "base"), trainer.args.output_dir, at_step=0), trainer.model)


def test_an_adapter_that_no_log_may_ask_for_is_built_by_the_user_who_replays(train, tmp_path):
    def adapted():
        torch.manual_seed(0)
        return seeded_peft_model(classifier(), HRAConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_proj"]), seed=7)

    trainer = train(adapted(), max_steps=2)
    torch.manual_seed(0)
    classifier().save_pretrained(tmp_path / "base")
    with pytest.raises(TrajectoryError, match=r"adapter\.HRA=.*make the adapter yourself, and call replay_onto"):
        rebuild_model(str(tmp_path / "base"), trainer.args.output_dir)
    assert same(rebuilt_from(adapted(), trainer), trainer.model)


def test_public_draws_leave_no_trace():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with publicly_seeded(1):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


def test_another_base_model_is_refused(train):
    trainer = train()
    other = classifier()
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(TrajectoryError, match="the initial values of what is trained are others"):
        replay_onto(other, Trajectory.read(trainer.args.output_dir))


def test_another_frozen_part_is_refused(train):
    model = classifier().requires_grad_(False)
    model.score.requires_grad_(True)
    base = copy.deepcopy(model)
    trainer = train(model)
    assert same(rebuilt_from(base, trainer), trainer.model)
    base.model.norm.weight.data += 1
    with pytest.raises(TrajectoryError, match="the weights that are not trained are others"):
        rebuilt_from(base, trainer)


def test_a_model_without_the_trained_parameters_is_refused(train):
    trainer = train()
    with pytest.raises(TrajectoryError, match="it has not the parameters that the log trains"):
        replay_onto(classifier(hidden_size=32), Trajectory.read(trainer.args.output_dir))


# ---- Devices ----


@pytest.mark.parametrize(
    ("settings", "anywhere"),
    [
        ({}, True),
        ({"method": "aggzo", "num_directions": 3, "update": "normalized"}, True),
        ({"directions": "gaussian"}, False),
        ({"directions": "sphere"}, False),
        ({"update": "adam"}, False),
        ({"method": "zoso", "num_stages": 2}, False),
        ({"method": "zoso", "num_stages": 2, "anchor_strength": 0}, True),
        ({"method": "projected", "radius": 1.0}, False),
    ],
)
def test_header_says_where_a_run_replays_bit_for_bit(train, settings, anywhere):
    log = Trajectory.read(train(**settings).args.output_dir)
    assert (log.header["replays_on"] == ANYWHERE) == anywhere
    check_device(log, torch.device("cpu"))
    if anywhere:
        check_device(log, torch.device("cuda"))
    else:
        with pytest.raises(TrajectoryError, match=r"device=cuda on .* replays bit for bit on cpu on .* alone"):
            check_device(log, torch.device("cuda"))


# ---- Size ----


def test_a_run_is_a_few_kilobytes(train):
    trainer = train(max_steps=20)
    path = Path(trainer.args.output_dir) / LOG_FILE
    log = Trajectory.read(path)
    header = len(json.dumps(log.header))
    assert path.stat().st_size == pytest.approx(header + 20 * 64, abs=100)
    assert header < 6000


def test_checkpoints_hold_no_optimizer_and_no_generator(train):
    trainer = train(update="adam", save_strategy="steps", save_steps=2)
    names = {path.name for path in (Path(trainer.args.output_dir) / "checkpoint-2").iterdir()}
    assert not {name for name in names if name.startswith(("optimizer", "scheduler", "rng_state", "scaler"))}


def test_log_holds_what_the_mechanism_released(train, monkeypatch):
    released = []
    kind = type(train().method.mechanism)
    release = kind.release
    monkeypatch.setattr(kind, "release", lambda *given: released.append(release(*given)) or released[-1])
    log = Trajectory.read(train().args.output_dir)
    assert [one.integers for one in log.records] == [one.integers for one in released]
