"""Frozen bases in 16 bits, and quantized ones, under float32 adapters: what trains, and what is refused."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers.trainer
from datasets import Dataset
from peft import LoraConfig, TaskType
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, GgufConfig, TorchAoConfig
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from hf_dpzo import ZOTrainer, replay_onto, seeded_peft_model
from hf_dpzo.cli.main import main
from hf_dpzo.isolation.probe import CoupledRowsError
from hf_dpzo.losses.causal_lm import CausalLMLoss
from hf_dpzo.models.checks import refuse_model
from hf_dpzo.models.fingerprints import fingerprint_frozen, fingerprint_values
from hf_dpzo.models.precision import (
    build_loading_options,
    describe_reduced_precision,
    forget_unpacked_quantizer,
    inner_tensors,
    refuse_shared_scales,
)
from hf_dpzo.trajectory.header import TrajectoryError
from hf_dpzo.trajectory.initial import describe_base_model
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.replay import rebuild_model
from hf_dpzo.verification.verify import verify

from support.models import causal_lm, classifier, with_lora
from support.paths import MEASUREMENTS
from support.recipes import refused, table
from support.rows import few_public_rows, labelled_rows


ROWS = Dataset.from_list(
    [
        {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": row["input_ids"]}
        for row in labelled_rows(20).to_list()
    ]
)


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8, computed by a kernel of torch that has no derivative."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale[:, None]).round().to(torch.int8), False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch._weight_int8pack_mm(x.flatten(0, -2).contiguous(), self.weight, self.scale)
        return flat.unflatten(0, x.shape[:-1])


def int8(model: nn.Module) -> nn.Module:
    """Return `model` with its MLPs quantized."""
    for layer in model.model.layers:
        for name, linear in list(layer.mlp.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(layer.mlp, name, Int8Linear(linear))
    return model


def adapted(model: nn.Module) -> nn.Module:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"])
    return seeded_peft_model(model, config, seed=1)


BASES = {
    "bfloat16": lambda: causal_lm().bfloat16(),
    "float16": lambda: causal_lm().half(),
    "int8": lambda: int8(causal_lm()),
    "int8 over bfloat16": lambda: int8(causal_lm().bfloat16()),
}


@pytest.fixture
def make_trainer(make_args, tokenizer):
    def make(model, *, args=None, loss=None, **changes) -> ZOTrainer:
        return ZOTrainer(
            model=model,
            args=args or make_args(**changes),
            train_dataset=ROWS,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            per_example_loss=loss,
        )

    return make


def build_adapted(name: str) -> nn.Module:
    """Return a base under an adapter, with the same weights each time."""
    torch.manual_seed(0)
    return adapted(BASES[name]())


FIXED = [{"padded_lengths": [8, 16]}, {"per_device_train_batch_size": 1}]


# ---- What trains ----


@pytest.mark.parametrize("fixed", FIXED, ids=["padded", "alone"])
@pytest.mark.parametrize("base", BASES)
def test_a_base_that_is_not_float32_trains_under_a_float32_adapter(base, fixed, make_trainer, tmp_path):
    trainer = make_trainer(build_adapted(base), smoothing=0.1, **fixed)
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    trainer.train()
    trainer.save_model()
    assert any(not torch.equal(p, trainer.model.get_parameter(name)) for name, p in trained.items())
    stated = json.loads((Path(trainer.args.output_dir) / "privacy.json").read_text())
    assert stated["validity_checks"]["numerical_isolation"]["status"] == "bitwise"
    replayed = build_adapted(base)
    replay_onto(replayed, Trajectory.read(trainer.args.output_dir))
    assert all(torch.equal(p, trainer.model.get_parameter(name)) for name, p in replayed.named_parameters())


def test_a_base_without_a_backward_pass_trains(make_trainer):
    model = adapted(int8(causal_lm()))
    tokens = torch.tensor([[5, 6, 7]])
    with pytest.raises(RuntimeError, match="derivative for aten::_weight_int8pack_mm is not implemented"):
        model(input_ids=tokens, labels=tokens).loss.backward()
    make_trainer(model, padded_lengths=[16]).train()


class Inference:
    """A quantizer that the stock Trainer refuses to train on."""

    is_trainable = False

    class quantization_config:
        quant_method = "of inference"


def test_quantizers_that_the_stock_trainer_refuses_are_accepted(make_trainer):
    """Fails when the stock Trainer no longer refuses them, and the patch can go."""
    model = adapted(int8(causal_lm()))
    model.get_base_model().is_quantized, model.get_base_model().hf_quantizer = True, Inference()
    check = transformers.trainer.validate_quantization_for_training
    with pytest.raises(ValueError, match="that quantization method do not support training"):
        check(model)
    make_trainer(model, padded_lengths=[16]).train()
    assert transformers.trainer.validate_quantization_for_training is check


def test_a_resumed_run_on_a_16_bit_base_ends_at_the_same_weights(make_trainer, make_args):
    args = make_args(padded_lengths=[16], smoothing=0.1, save_strategy="steps", save_steps=2)
    first = make_trainer(build_adapted("bfloat16"), args=args)
    first.train()
    second = make_trainer(build_adapted("bfloat16"), args=args)
    second.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    trained = [[p for p in trainer.model.parameters() if p.requires_grad] for trainer in (first, second)]
    assert fingerprint_values(trained[0]) == fingerprint_values(trained[1])


def test_a_base_in_another_dtype_cannot_continue_a_log(make_trainer, make_args):
    args = make_args(padded_lengths=[16], smoothing=0.1)
    make_trainer(build_adapted("bfloat16"), args=args).train()
    other = make_trainer(adapted(causal_lm()), args=args)
    with pytest.raises(TrajectoryError, match=r'base\.dtype="bfloat16" there and null here'):
        other.train(resume_from_checkpoint=True)


# ---- What is refused ----


@pytest.mark.parametrize("base", BASES)
def test_shapes_that_depend_on_the_batch_are_refused(base, make_trainer):
    with pytest.raises(ValueError, match=r"by its shape; set padded_lengths or per_device_train_batch_size=1, or load"):
        make_trainer(build_adapted(base))


def test_a_run_without_privacy_needs_no_fixed_shapes(make_trainer):
    without = {"noise_multiplier": "absent", "target_delta": "absent", "method": "mezo"}
    make_trainer(build_adapted("bfloat16"), **without).train()


def test_a_new_head_that_would_be_trained_in_16_bits_is_refused():
    with pytest.raises(ValueError, match=r"score\S*: it is trained in torch\.bfloat16, where walking"):
        refuse_model(with_lora(classifier().bfloat16()), private=True)


class Joined(nn.Module):
    """A layer whose subclasses join the rows of a batch in several ways."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class QuantizedByTheBatch(Joined):
    """Rounds activations to 8 bits with one scale for the whole tensor, as dynamic quantization does."""

    def forward(self, x):
        scale = x.abs().amax() / 127
        return self.layer(((x / scale).round() * scale).to(x.dtype))


class OutlierColumns(Joined):
    """Keeps columns in which any row has a large entry and rounds the others, as LLM.int8 does."""

    def forward(self, x):
        scale = x.abs().amax(dim=-1, keepdim=True) / 7
        large = x.abs().flatten(0, -2).amax(dim=0) > 2
        return self.layer(torch.where(large, x, (x / scale).round() * scale).to(x.dtype))


class ByPlace(Joined):
    """Rounds the last rows of a batch differently, as a kernel may at the edge of its tiles."""

    def forward(self, x):
        x = self.layer(x)
        return torch.cat([x[:2], (x[2:].float() * (1 + 2**-8)).to(x.dtype)])


@pytest.mark.parametrize("kind", [QuantizedByTheBatch, OutlierColumns, ByPlace])
@pytest.mark.parametrize("base", BASES)
def test_rows_joined_in_a_fixed_shape_are_caught(kind, base, make_trainer):
    model = BASES[base]()
    mlp = model.model.layers[0].mlp
    mlp.down_proj = kind(mlp.down_proj)
    for layer in model.model.layers:  # Makes the effect of the layer visible.
        layer.post_attention_layernorm.weight.data.mul_(60)
    trainer = make_trainer(adapted(model), smoothing=0.1, padded_lengths=[16])
    with pytest.raises(ValueError, match=r"float32\.$") as caught:
        trainer.train()
    assert isinstance(caught.value, CoupledRowsError) or "even in a fixed shape" in str(caught.value)
    assert len(trainer.budget.ledger) == 0


def by_last_bit(model, inputs):
    """Return losses whose last bits depend on a row's place in the batch."""
    losses = CausalLMLoss(model)(model, inputs)
    return torch.cat([losses[:2], losses[2:] * (1 + 2**-20)])


def test_rounding_that_is_allowed_in_float32_is_refused_in_16_bits(make_trainer):
    """It is far below coupling, but too much where losses must be equal to the last bit."""
    with pytest.raises(ValueError, match=r"bfloat16, .* move each other's losses by \S+ even in a fixed"):
        make_trainer(adapted(causal_lm().bfloat16()), loss=by_last_bit, padded_lengths=[16]).train()


class Scaled(nn.Parameter):
    """A parameter that says how activations are scaled, as torchao's tensors do."""


def with_scaled_activations(granularity: str) -> nn.Module:
    model = causal_lm()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.act_quant_kwargs = type("Kwargs", (), {"granularity": type(granularity, (), {})()})()
    return model


class Linear8bitLt(nn.Linear):
    """A layer with the name of one of bitsandbytes."""


def with_outliers() -> nn.Module:
    model = causal_lm()
    model.model.layers[0].mlp.up_proj = Linear8bitLt(16, 32)
    return model


def configured(**quantization) -> nn.Module:
    model = causal_lm()
    model.config.quantization_config = quantization
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_scaled_activations("PerTensor"), r"mlp\.up_proj\.weight: its activations are scaled PerTensor"),
        (with_outliers, r"mlp\.up_proj: LLM\.int8 picks outlier columns by the whole batch"),
        (lambda: configured(quant_method="bitsandbytes", load_in_8bit=True), "quantization_config=bitsandbytes: "),
        (lambda: configured(quant_method="fbgemm_fp8"), "quantization_config=fbgemm_fp8: it is not known to treat"),
    ],
    ids=["per tensor", "outliers", "int8", "unknown"],
)
def test_quantizers_that_join_rows_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        refuse_model(make(), private=True)
    refuse_model(make(), private=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_scaled_activations("PerRow"),
        lambda: configured(quant_method="bitsandbytes", load_in_4bit=True),
        lambda: configured(quant_method="gptq"),
    ],
)
def test_quantizers_of_weights_alone_are_left_to_the_probe(make):
    refuse_shared_scales(make())


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_of_torch_is_refused_by_name():
    try:
        model = torch.ao.quantization.quantize_dynamic(causal_lm(), {nn.Linear}, dtype=torch.qint8)
    except (AttributeError, RuntimeError):
        pytest.skip("this build of torch has no dynamic quantization")
    with pytest.raises(ValueError, match=r"Linear of torch\.ao scales activations by the whole batch"):
        refuse_shared_scales(model)


# ---- What is recorded about a base ----


def test_float32_is_full_precision_and_anything_less_is_reduced():
    assert describe_reduced_precision(causal_lm()) is None
    assert describe_reduced_precision(adapted(causal_lm())) is None
    assert {name: describe_reduced_precision(build_adapted(name)).split(": ")[1] for name in BASES} == {
        "bfloat16": "it is torch.bfloat16",
        "float16": "it is torch.float16",
        "int8": "it is quantized",
        "int8 over bfloat16": "it is quantized",
    }
    assert describe_reduced_precision(configured(quant_method="gptq")) == "quantization_config: the base is quantized"
    buffered = nn.Linear(2, 2)
    buffered.register_buffer("packed", torch.zeros(2, dtype=torch.uint8))
    assert describe_reduced_precision(buffered) == "packed: it is torch.uint8"


def test_logs_name_the_dtype_and_quantization_of_a_base():
    descriptions = {name: describe_base_model(build_adapted(name)) for name in BASES}
    kept = {
        name: {key: base[key] for key in ("dtype", "quantization") if key in base}
        for name, base in descriptions.items()
    }
    assert kept == {
        "bfloat16": {"dtype": "bfloat16"},
        "float16": {"dtype": "float16"},
        "int8": {"quantization": "other"},
        "int8 over bfloat16": {"dtype": "bfloat16", "quantization": "other"},
    }
    assert not {"dtype", "quantization"} & set(describe_base_model(causal_lm()))


def test_a_fingerprint_changes_with_every_part_of_a_quantized_tensor():
    """The parts are packed bits, scales and zero points, also of tensors within tensors."""
    parts = [torch.arange(4).to(torch.int8), torch.ones(4, dtype=torch.int8), torch.zeros(4, dtype=torch.int8)]

    def quantized() -> nn.Module:
        inner = TwoTensor(parts[1].clone(), parts[2].clone())
        model = nn.Module()
        model.weight = nn.Parameter(TwoTensor(TwoTensor(parts[0].clone(), parts[0].clone()), inner), False)
        return model

    fingerprints = {fingerprint_frozen(quantized(), [])}
    assert fingerprint_frozen(quantized(), []) in fingerprints
    for part in range(4):
        model = quantized()
        list(inner_tensors(model.weight.data))[part][1] += 1
        assert fingerprint_frozen(model, []) not in fingerprints
        fingerprints.add(fingerprint_frozen(model, []))
    assert len(fingerprints) == 5


# ---- Recipes, replays, verification ----


def test_a_recipe_in_bfloat16_trains_replays_and_verifies(write, workplace, capsys):
    recipe = write(dtype="bfloat16", padded_lengths=[8], max_length=8, smoothing=0.1)
    assert main(["train", recipe]) == 0
    log = Trajectory.read(workplace / "out")
    assert log.header["base"]["dtype"] == "bfloat16"
    assert log.header["made_with"]["isolation"]["status"] == "bitwise"
    base = str(workplace / "causal")
    assert rebuild_model(base, workplace / "out").get_base_model().dtype == torch.bfloat16
    assert main(["replay", base, str(workplace / "out"), "--output", str(workplace / "again")]) == 0
    weights = [(workplace / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    assert all(finding.holds for finding in verify(workplace / "out", base=base))
    assert "loaded in bfloat16" in (workplace / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, "dtype: invalid choice: 'float8'"),
        ({"quantization": "int3"}, "quantization: invalid choice: 'int3'"),
        ({"dtype": "bfloat16", "adapter": "none"}, "adapter=none: with dtype=bfloat16, .* choose lora"),
        ({"quantization": "int8", "adapter": "none"}, "adapter=none: "),
        ({"quantization": "int8", "gguf_file": "a.gguf"}, "quantization=int8: a GGUF file is unpacked"),
        ({"dtype": "bfloat16"}, r"it is torch.bfloat16, .* set padded_lengths or per_device_train_batch_size=1"),
    ],
    ids=str,
)
def test_invalid_precisions_are_refused_in_one_sentence(write, capsys, changes, message):
    assert re.search(message, refused(capsys, "train", write(**changes)))


def test_a_base_that_a_log_cannot_name_is_not_rebuilt(make_trainer, tmp_path):
    causal_lm().save_pretrained(tmp_path / "base")
    trainer = make_trainer(adapted(int8(causal_lm())), padded_lengths=[16], smoothing=0.1)
    trainer.train()
    with pytest.raises(TrajectoryError, match=r"quantization=other: it is not one of int8, .* call replay_onto\.$"):
        rebuild_model(str(tmp_path / "base"), trainer.args.output_dir)


def test_a_log_with_an_unknown_dtype_or_quantization_is_at_fault(make_trainer, tmp_path):
    from hf_dpzo.io.strict_json import find_fault

    trainer = make_trainer(build_adapted("bfloat16"), padded_lengths=[16], smoothing=0.1)
    trainer.train()
    header = copy.deepcopy(dict(Trajectory.read(trainer.args.output_dir).header))
    for name, value in (("dtype", "float64"), ("dtype", 1), ("quantization", "int4"), ("quantization", None)):
        changed = {**header, "base": {**header["base"], name: value}}
        assert find_fault(changed, "trajectory-header.json").startswith(f"base.{name}=")


# ---- The measurement ----


def test_stochastic_rounding_is_unbiased_and_yields_a_neighbouring_number(monkeypatch):
    monkeypatch.syspath_prepend(str(MEASUREMENTS))
    import walking

    value = 1 + 2**-7 / 4  # A quarter of the way from one to the next number in bfloat16.
    bits = torch.arange(2**16, dtype=torch.int32)
    rounded = walking.stochastically(torch.full((2**16,), value), bits)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert rounded.unique().tolist() == [1, 1 + 2**-7]
    assert rounded.mean().item() == value
    monkeypatch.delitem(sys.modules, "walking")


# ---- A real quantizer, where it is installed ----


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization", reason="it is no dependency")


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_in_int8_trains_replays_and_verifies(torchao, write, workplace, capsys):
    recipe = write(quantization="int8", padded_lengths=[8], max_length=8)
    assert main(["train", recipe]) == 0
    assert "epsilon" in table(capsys.readouterr().out)
    log = Trajectory.read(workplace / "out")
    assert log.header["base"]["quantization"] == "int8"
    base = str(workplace / "causal")
    rebuilt = rebuild_model(base, workplace / "out")
    assert any(list(inner_tensors(p)) != [p] for p in rebuilt.parameters())
    assert all(finding.holds for finding in verify(workplace / "out", base=base))


@pytest.mark.filterwarnings("ignore")
def test_torchao_dynamic_quantization_is_refused_by_tensor_and_accepted_by_token(torchao, workplace):
    from torchao.quantization.granularity import PerRow, PerTensor

    for granularity, joins in ((PerTensor(), True), (PerRow(), False)):
        model = AutoModelForCausalLM.from_pretrained(workplace / "causal")
        torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(granularity=granularity))
        if joins:
            with pytest.raises(ValueError, match="its activations are scaled PerTensor, by the whole batch"):
                refuse_shared_scales(model)
        else:
            refuse_shared_scales(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Int8DynamicActivationInt8WeightConfig", "IntxWeightOnlyConfig"])
def test_torchao_bases_that_the_stock_trainer_cannot_train_are_trained(kind, torchao, workplace, make_trainer):
    """One has kernels without derivatives, and the stock Trainer refuses to train on the other."""
    quantized = TorchAoConfig(getattr(torchao, kind)())
    model = adapted(AutoModelForCausalLM.from_pretrained(workplace / "causal", quantization_config=quantized))
    tokens = torch.tensor([[5, 6, 7]])
    with pytest.raises((RuntimeError, ValueError), match=r"does not require grad|do not support training"):
        transformers.trainer.validate_quantization_for_training(model)
        model(input_ids=tokens, labels=tokens).loss.backward()
    trainer = make_trainer(model, padded_lengths=[16], smoothing=0.1)
    trainer.train()
    assert Trajectory.read(trainer.args.output_dir).header["base"]["quantization"] == "other"


@pytest.mark.filterwarnings("ignore")
def test_a_fingerprint_changes_with_every_part_of_a_torchao_tensor(torchao):
    def quantized() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 8))
        torchao.quantize_(model, torchao.IntxWeightOnlyConfig())
        return model

    fingerprints = {fingerprint_frozen(quantized(), [])}
    parts = len(list(inner_tensors(quantized()[0].weight.data)))
    for part in range(parts):
        model = quantized()
        list(inner_tensors(model[0].weight.data))[part].flatten()[:1].add_(1)
        fingerprints.add(fingerprint_frozen(model, []))
    assert fingerprint_frozen(quantized(), []) in fingerprints
    assert parts == 3
    assert len(fingerprints) == 1 + parts


def test_quantization_without_torchao_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr("hf_dpzo.models.precision.is_torchao_available", lambda: False)
    with pytest.raises(ValueError, match="quantization=int8: torchao makes it, and is not there; pip install torchao"):
        build_loading_options("float32", "int8")
    assert build_loading_options("bfloat16", None) == {"dtype": torch.bfloat16}


def test_a_16_bit_base_may_be_probed_with_given_public_rows(make_trainer, make_args, tokenizer):
    trainer = ZOTrainer(
        model=build_adapted("bfloat16"),
        args=make_args(padded_lengths=[16], smoothing=0.1),
        train_dataset=ROWS,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        probe_rows=[{**row, "labels": row["input_ids"]} for row in few_public_rows()],
    )
    trainer.train()


class LinearActivationQuantizedTensor(torch.Tensor):
    """A tensor with the name that older versions of torchao used."""


def test_tensors_that_do_not_say_how_activations_are_scaled_are_refused():
    model = classifier()
    hidden = torch.zeros(2, 2).as_subclass(LinearActivationQuantizedTensor)
    model.score.weight = torch.nn.Parameter(hidden, requires_grad=False)
    with pytest.raises(ValueError, match=r"^score\.weight: LinearActivationQuantizedTensor does not say how "):
        refuse_shared_scales(model)


@pytest.mark.parametrize("packed", [False, True])
def test_a_gguf_file_that_was_unpacked_is_not_quantized(tmp_path, packed):
    """As transformers leaves a model that it was not asked to unpack, and had to."""
    model = classifier()
    configuration = GgufConfig()
    model.config.quantization_config, model.is_quantized = configuration, True
    model.hf_quantizer = GgufHfQuantizer(configuration)
    if packed:
        model.score.packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert describe_reduced_precision(model) is not None
    forget_unpacked_quantizer(model)
    assert (describe_reduced_precision(model) is not None) == packed
    if not packed:
        model.save_pretrained(tmp_path)
        assert not hasattr(type(model).from_pretrained(tmp_path).config, "quantization_config")
