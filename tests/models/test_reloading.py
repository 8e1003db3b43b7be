"""What is saved of an adapter is what was trained: tried before anything is spent, by PEFT's own saving and loading."""

import copy

import pytest
import torch
from peft import HRAConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from hf_dpzo import ZOTrainer
from hf_dpzo.models.precision import refuse_packed_gguf
from hf_dpzo.models.reloading import refuse_inexact_reload

from support.models import causal_lm
from support.rows import labelled_rows


LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
TOKENS = torch.tensor([[5, 6, 7, 8]])
EXACT = {
    **{str(init): LoraConfig(init_lora_weights=init, **LORA) for init in (True, "gaussian", "pissa", "olora")},
    "orthogonal": LoraConfig(init_lora_weights="orthogonal", **LORA),
    "dora": LoraConfig(use_dora=True, **LORA),
    "tokens": LoraConfig(trainable_token_indices=[1, 2], **LORA),
    "head": LoraConfig(modules_to_save=["lm_head"], **LORA),
    "layers": LoraConfig(**LORA, layers_to_transform=[1], rank_pattern={"q_proj": 2}),
    "pattern": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=".*layers.1.*q_proj"),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
    "vera": VeraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    "hra": HRAConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Loads a base model, always the same."""
    torch.manual_seed(0)
    model = causal_lm(initializer_range=0.3)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return lambda: type(model).from_pretrained(folder)


@torch.no_grad()
def train(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def drift_of_reload(model: PeftModel, base, folder) -> float:
    """How far the logits move when PEFT itself saves the model and loads it on the base."""
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base(), folder).eval()
    return float((loaded(input_ids=TOKENS).logits - model(input_ids=TOKENS).logits).abs().max())


@pytest.mark.parametrize("name", EXACT)
def test_an_adapter_that_peft_loads_as_it_was_is_accepted_and_left_alone(base, tmp_path, name):
    model = train(get_peft_model(base(), copy.deepcopy(EXACT[name])))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refuse_inexact_reload(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert drift_of_reload(model, base, tmp_path) < 1e-4


def test_an_adapter_that_peft_loads_otherwise_is_refused_before_anything_is_spent(base, tmp_path, make_args):
    model = get_peft_model(base(), LoraConfig(init_lora_weights="pissa_niter_4", **LORA))
    assert drift_of_reload(train(copy.deepcopy(model)), base, tmp_path) > 0.01
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa_niter_4': .* is another one each time"):
        ZOTrainer(model=model, args=make_args(), train_dataset=labelled_rows(40))


def test_an_adapter_that_peft_can_not_make_again_is_refused(base):
    config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"), **LORA)
    model = base()
    preprocess_corda(model, config, run_model=lambda: model(input_ids=TOKENS[:, :1]))
    with pytest.raises(ValueError, match=r"init_lora_weights='corda': .* fails \(\w+\), so that"):
        refuse_inexact_reload(get_peft_model(model, config))


def test_gguf_weights_that_are_packed_are_refused_with_what_unpacks_them():
    model = causal_lm()
    model.config.quantization_config = {"quant_method": "gguf"}
    refuse_packed_gguf(model)  # All unpacked.
    model.packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"GgufConfig\(dequantize=True\)\.$"):
        refuse_packed_gguf(model)
