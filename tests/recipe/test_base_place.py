"""A base model that is not where a recipe says is one sentence, before anything is loaded or waited for."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from hf_dpzo.models import base_place
from hf_dpzo.recipe import loading
from hf_dpzo.recipe.recipe import read_recipe

from support.recipes import refused


@pytest.fixture(autouse=True)
def _nothing_loads(monkeypatch):
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(base_place.HfApi, "model_info", lambda *_, **__: pytest.fail("the Hub was asked"))


@pytest.fixture
def packed(workplace):
    """A folder with two GGUF files and no other model."""
    folder = workplace / "packed"
    folder.mkdir()
    for name in ("a.Q4_1.gguf", "b.Q4_1.gguf"):
        (folder / name).touch()
    return folder


def test_a_wrong_or_missing_gguf_file_is_told_what_there_is(write, packed, workplace, capsys):
    asked = {"model_name_or_path": str(packed), "gguf_file": "a.Q4_0.gguf"}
    said = refused(capsys, "train", write(**asked))
    assert said.startswith("gguf_file=a.Q4_0.gguf: the folder of model_name_or_path=")
    assert said.endswith("holds no such file, only a.Q4_1.gguf, b.Q4_1.gguf; name one of these.\n")
    missing = refused(capsys, "plan", write(model_name_or_path=str(packed)))
    assert missing.startswith("gguf_file: missing;") and "a.Q4_1.gguf, b.Q4_1.gguf; set it to one" in missing
    none = refused(capsys, "tune", write(gguf_file="a.gguf"))
    assert none.endswith("holds no such file, nor any other; leave gguf_file out.\n")
    (workplace / "empty").mkdir()
    empty = refused(capsys, "train", write(model_name_or_path=str(workplace / "empty")))
    assert "the folder holds no config.json, only nothing" in empty
    file = refused(capsys, "train", write(model_name_or_path=str(packed / "a.Q4_1.gguf")))
    assert f"it is a file; name the folder {packed}, and gguf_file=a.Q4_1.gguf" in file


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "~/nowhere/model", "a/b/c"])
def test_a_mistyped_folder_is_not_asked_for_on_the_hub(write, packed, monkeypatch, capsys, name):
    monkeypatch.chdir(packed.parent)
    said = refused(capsys, "train", write(model_name_or_path=name))
    assert (
        said.startswith(f"model_name_or_path={name}: there is no such folder (/") and "or user/model on the Hub" in said
    )


def test_a_hub_that_has_or_says_nothing_is_one_sentence(write, monkeypatch, capsys):
    def answer(found):
        def call(*_, **__):
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(base_place.HfApi, "model_info", call)
        return refused(capsys, "train", write(model_name_or_path="someone/model"))

    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    offline = answer(httpx.ConnectError("[Errno -2] Name or service not known"))
    assert offline.startswith("model_name_or_path=someone/model: it is no folder here (/")
    assert "and the Hub cannot be reached (ConnectError); check the network" in offline
    assert "package://name" in offline
    assert "and the Hub shows no such repository; check the name" in answer(
        HfHubHTTPError("404 Not Found", response=response)
    )
    files = SimpleNamespace(siblings=[SimpleNamespace(rfilename="m.gguf")])
    assert "the repository of model_name_or_path=someone/model holds GGUF files, m.gguf; set it" in answer(files)


def test_a_model_in_the_cache_is_not_asked_for(write, monkeypatch):
    monkeypatch.setattr(base_place, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    recipe, _ = read_recipe(write(model_name_or_path="someone/model"))
    with pytest.raises(pytest.fail.Exception, match="it was loaded"):
        loading.load_tokenizer(recipe)
