"""The adapter that is trained is the one that computes and is saved, and whoever switches or merges it is told."""

import copy

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftMixedModel, PromptTuningConfig, TaskType, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from safetensors.torch import load_file

from hf_dpzo import seeded_peft_model
from hf_dpzo.models.adapters import (
    find_trained_adapter,
    list_adapted_modules,
    name_as_published,
    refuse_refrozen_parameters,
    refuse_switched_adapter,
    refuse_unsaved_parameters,
    saved_alone,
)
from hf_dpzo.models.fingerprints import fingerprint_frozen

from support.adapters import ADAPTERS
from support.models import classifier, one_layer


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"task_type": TaskType.SEQ_CLS, "r": 2, "target_modules": ["q_proj", "v_proj"], **changes})


def two(first: str = "mine", second: str = "other", **changes):
    """A model with two adapters, of which the first one is active."""
    model = get_peft_model(one_layer(), lora(), adapter_name=first)
    model.add_adapter(second, lora(**changes))
    model.set_adapter(first)
    return model


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", ["default", "medical", "a-1"])
def test_an_adapter_of_any_name_is_found(name):
    model = get_peft_model(one_layer(), lora(), adapter_name=name)
    assert find_trained_adapter(model) == name
    refuse_unsaved_parameters(model)


def test_a_model_without_adapter_has_none():
    assert find_trained_adapter(one_layer()) is None
    refuse_unsaved_parameters(one_layer())


@pytest.mark.parametrize("other", [{}, {"target_modules": ["k_proj"]}, {"modules_to_save": ["norm"]}])
def test_an_adapter_beside_another_one_is_found_and_the_other_one_counts_for_nothing(other):
    model = two(**other)
    assert find_trained_adapter(model) == "mine"
    refuse_unsaved_parameters(model)
    alone = name_as_published(model, model.state_dict())
    assert not [name for name in alone if "other" in name or "mine" in name]
    frozen = fingerprint_frozen(model, trained(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.add_(1)
    assert fingerprint_frozen(model, trained(model)) == frozen
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.add_(1)
    assert fingerprint_frozen(model, trained(model)) != frozen


def test_names_do_not_depend_on_what_the_adapter_is_called_nor_on_its_neighbours():
    alone = get_peft_model(one_layer(), lora())
    named = name_as_published(alone, dict(alone.named_parameters()))
    assert list(named) == [name for name, _ in alone.named_parameters()]
    assert list(name_as_published(two(), dict(two().named_parameters()))) == list(named)


def test_a_base_model_with_modules_in_a_dictionary_keeps_their_names():
    base = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2)}))
    model = get_peft_model(base, LoraConfig(target_modules=["0"]), adapter_name="mine")
    assert "base_model.model.1.default.weight" in name_as_published(model, dict(model.named_parameters()))


def test_adapted_modules_are_those_of_the_trained_adapter():
    assert list_adapted_modules(two(target_modules=["k_proj"])) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]


SWITCHES = {
    "another one": (lambda model: model.set_adapter("other"), "training began with adapter=mine"),
    "another one below": (lambda model: model.base_model.set_adapter("other"), "other computes"),
    "both": (
        lambda model: model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").set_adapter(
            ["mine", "other"]
        ),
        "mine and other computes",
    ),
    "merged": (lambda model: model.merge_adapter(), "mine was merged"),
    "the other one merged": (lambda model: model.merge_adapter(["other"]), "other was merged"),
    "merged and taken off": (lambda model: model.merge_and_unload(), "no longer holds all that is trained"),
    "taken off": (lambda model: model.unload(), "no longer holds all that is trained"),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), "it is disabled"),
    "deleted": (lambda model: model.delete_adapter("mine"), "training began with adapter=mine"),
    "one layer alone": (
        lambda model: model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj").set_adapter("other"),
        "layers.0.self_attn.v_proj other computes",
    ),
    "one layer alone disabled": (
        lambda model: model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj").enable_adapters(False),
        "it is disabled in base_model.model.model.layers.0.self_attn.v_proj",
    ),
    "another one added": (lambda model: model.add_adapter("third", lora()), "adapter=third: it was added or deleted"),
    "another one deleted": (lambda model: model.delete_adapter("other"), "adapter=other: it was added or deleted"),
    "head disabled": (lambda model: model.base_model.model.score.enable_adapters(False), "it is disabled in .*score"),
    "layer exchanged": (
        lambda model: setattr(model.base_model.model.model.layers[0].self_attn, "q_proj", torch.nn.Linear(16, 16)),
        "no longer holds all that is trained",
    ),
}


@pytest.mark.filterwarnings("ignore:Adapter")
@pytest.mark.parametrize("how", SWITCHES)
def test_an_adapter_that_is_switched_merged_or_taken_off_is_refused(how):
    change, message = SWITCHES[how]
    model = two()
    moved = trained(model)
    refuse_switched_adapter(model, ("mine", "other"), moved)
    change(model)
    with pytest.raises(ValueError, match=message):
        refuse_switched_adapter(model, ("mine", "other"), moved)


HARMLESS = {
    "there and back": lambda model: (model.set_adapter("other"), model.set_adapter("mine")),
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "disabled for a while": lambda model: (
        model.disable_adapter().__enter__() or model.base_model.enable_adapter_layers()
    ),
}


@pytest.mark.parametrize("how", HARMLESS)
def test_an_adapter_that_is_what_it_was_goes_on(how):
    model = two()
    moved = trained(model)
    HARMLESS[how](model)
    refuse_switched_adapter(model, ("mine", "other"), moved)
    refuse_refrozen_parameters(model, moved)


def test_parameters_that_are_frozen_or_unfrozen_in_between_are_refused():
    model = two()
    moved = trained(model)
    moved[0].requires_grad_(False)
    with pytest.raises(ValueError, match="was frozen, and updates move it"):
        refuse_refrozen_parameters(model, moved)
    moved[0].requires_grad_(True)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm.weight: .* was unfrozen, and no update moves it"):
        refuse_refrozen_parameters(model, moved)


def test_a_head_that_is_unfrozen_by_hand_is_refused_because_no_adapter_would_hold_it():
    model = get_peft_model(one_layer(), lora())
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm.weight: it is trained, and would not be saved with adapter=default"):
        refuse_unsaved_parameters(model)


def test_another_adapter_that_is_trained_too_is_refused():
    model = two()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".other." in name)
    with pytest.raises(ValueError, match=r"other.weight: it is trained, and would not be saved with adapter=mine"):
        refuse_unsaved_parameters(model)


def test_an_adapter_that_the_model_keeps_without_a_configuration_is_refused():
    model = two()
    del model.peft_config["other"]
    with pytest.raises(ValueError, match=r"lora_A.other.weight: it is of another adapter, and would be saved"):
        refuse_unsaved_parameters(model)


@pytest.mark.parametrize("name", ["q_proj", "self_attn", "lora_A", "weight"])
def test_an_adapter_called_like_a_module_is_refused(name):
    for model in (two(second=name), get_peft_model(one_layer(), lora(), adapter_name=name)):
        with pytest.raises(ValueError, match=f"adapter={name}: a part of the model is called so too"):
            refuse_unsaved_parameters(model)


@pytest.mark.parametrize("config", [lora(bias="lora_only"), lora(bias="all"), lora(use_dora=True)])
def test_whatever_peft_saves_may_be_trained(config):
    refuse_unsaved_parameters(get_peft_model(classifier(attention_bias=True), config, adapter_name="mine"))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # Of layers that it can not merge an adapter into.
def test_virtual_tokens_and_norms_may_be_trained():
    tokens = PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3)
    norms = LNTuningConfig(task_type=TaskType.SEQ_CLS, target_modules=["norm"])
    for config in (tokens, norms):
        model = get_peft_model(one_layer(), config, adapter_name="mine")
        refuse_unsaved_parameters(model)
        assert not [name for name in name_as_published(model, model.state_dict()) if "mine" in name]


def added_by_transformers():
    model = one_layer()
    model.add_adapter(lora(), "mine")
    return model


def around_another():
    return get_peft_model(get_peft_model(one_layer(), lora()), lora(target_modules=["k_proj"]), adapter_name="second")


def mixed():
    return get_peft_model(one_layer(), lora(), mixed=True)


UNHELD = {
    "transformers' own": added_by_transformers,
    "transformers' own inside": lambda: get_peft_model(added_by_transformers(), lora(), adapter_name="second"),
    "one around another": around_another,
    "mixed": mixed,
    "base model with the layers of one": lambda: get_peft_model(one_layer(), lora()).get_base_model(),
    "inside another module": lambda: torch.nn.Sequential(get_peft_model(one_layer(), lora())),
    "compiled": lambda: torch.compile(get_peft_model(one_layer(), lora()), backend="eager"),
}


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
@pytest.mark.parametrize("made", UNHELD)
def test_an_adapter_that_no_peft_model_holds_is_refused(made):
    model = UNHELD[made]()
    assert (made != "mixed") or isinstance(model, PeftMixedModel)
    with pytest.raises(ValueError, match=r"model: it has an adapter, and .*seeded_peft_model"):
        find_trained_adapter(model)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_trained_adapter_alone_is_saved_in_the_folder_itself(name, tmp_path):
    model = two(first=name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own").write_text("the user's")
    with saved_alone(model):
        model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "mine"),
    }
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["own"]
    model.save_pretrained(tmp_path / "stock")  # As stock again.
    assert (tmp_path / "stock" / "other").is_dir()


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    model = two()
    with pytest.raises(AttributeError), saved_alone(model):
        model.save_pretrained(tmp_path, state_dict="none")
    assert list(tmp_path.glob("_adapter-*")) == []
    assert "save_pretrained" not in vars(model)


def test_peft_holds_the_parts_of_adapters_as_it_did():
    """The structure that `name_as_published` and the checks read: which attributes layers and their holders have."""
    model = seeded_peft_model(one_layer(), lora(), seed=1)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.active_adapters, layer.merged_adapters, layer.disable_adapters) == (["default"], [], False)
    assert (model.base_model.model.score.active_adapters, model.base_model.model.score.merged_adapters) == (
        ["default"],
        [],
    )
    assert list(BufferDict({"a": torch.zeros(1)}).keys()) == ["a"]


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_is_published_alike_whatever_it_is_called(kind, tmp_path):
    base = classifier()
    default, named = (
        get_peft_model(copy.deepcopy(base), copy.deepcopy(ADAPTERS[kind]), adapter_name=name)
        for name in ("default", "medical")
    )
    refuse_unsaved_parameters(named)
    published = name_as_published(named, named.state_dict())
    assert list(published) == list(default.state_dict())
    default.load_state_dict(published)
    for model, folder in ((default, tmp_path / "default"), (named, tmp_path / "named")):
        with saved_alone(model):
            model.save_pretrained(folder)
    tensors, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("named", "default"))
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
