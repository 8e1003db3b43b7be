"""A configuration of every kind of adapter."""

from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    TaskType,
    VeraConfig,
)


ON = {"task_type": TaskType.SEQ_CLS, "target_modules": ["q_proj", "v_proj"]}
VIRTUAL = {"task_type": TaskType.SEQ_CLS, "num_virtual_tokens": 3}
ADAPTERS = {
    "lora": LoraConfig(r=2, **ON),
    "dora": LoraConfig(r=2, use_dora=True, **ON),
    "lora with a whole module": LoraConfig(r=2, modules_to_save=["norm"], **ON),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=100, **ON),
    "vera": VeraConfig(r=4, **ON),
    "randlora": RandLoraConfig(r=4, **ON),
    "oft": OFTConfig(oft_block_size=8, **ON),
    "boft": BOFTConfig(boft_block_size=4, **ON),
    "hra": HRAConfig(r=2, **ON),
    "fourierft": FourierFTConfig(n_frequency=10, **ON),
    "ia3": IA3Config(task_type=TaskType.SEQ_CLS),
    "norms": LNTuningConfig(task_type=TaskType.SEQ_CLS, target_modules=["norm", "input_layernorm"]),
    "prompt": PromptTuningConfig(**VIRTUAL),
    "prefix": PrefixTuningConfig(**VIRTUAL),
    "p-tuning": PromptEncoderConfig(encoder_hidden_size=8, **VIRTUAL),
}
