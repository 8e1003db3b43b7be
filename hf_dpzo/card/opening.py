"""Code that opens a model that writes, by transformers and PEFT alone."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_dpzo.card.quoting import quote_python
from hf_dpzo.models.location import PACKAGE_PREFIX


# Tasks whose models `AutoModelForCausalLM` opens, and which go on with a text.
OPENED_TASKS = ("causal-lm", "chat", "generation")


_UNKNOWN_PLACE = "WHERE_THE_BASE_MODEL_IS"


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Lines of Python that open a model, as `model`.

    Args:
        imports: what they import, by module.
        lines: the lines.
    """

    imports: Mapping[str, Sequence[str]]
    lines: Sequence[str]


def open_whole(place: str) -> Opening:
    """Return how a model is opened that is whole.

    >>> open_whole("user/model").lines
    ['model = AutoModelForCausalLM.from_pretrained("user/model")']
    """
    lines = [f"model = AutoModelForCausalLM.from_pretrained({quote_python(place)})"]
    return Opening(imports={"transformers": ["AutoModelForCausalLM"]}, lines=lines)


def open_adapter(place: str) -> Opening:
    """Return how an adapter is opened whose configuration says where its base model is.

    >>> open_adapter("user/adapter").lines
    ['model = AutoPeftModelForCausalLM.from_pretrained("user/adapter")']
    """
    lines = [f"model = AutoPeftModelForCausalLM.from_pretrained({quote_python(place)})"]
    return Opening(imports={"peft": ["AutoPeftModelForCausalLM"]}, lines=lines)


def open_adapter_on(place: str, base: Mapping[str, Any]) -> Opening:
    r"""Return how an adapter is opened whose base model is not on the Hub.

    Args:
        place: where the adapter is.
        base: the base model, as a statement has it.

    >>> print(*open_adapter_on("out", {"name": "package://words/x/m.gguf", "dtype": "bfloat16"}).lines, sep="\n")
    folder = Path(find_spec("words").submodule_search_locations[0], "x")
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype="bfloat16")
    model = PeftModel.from_pretrained(base, "out")
    """
    imports = {"peft": ["PeftModel"], "transformers": ["AutoModelForCausalLM"]}
    arguments, lines = [quote_python(_UNKNOWN_PLACE)], []
    found = re.fullmatch(rf"{PACKAGE_PREFIX}(\w+)(/.*)?", base["name"], re.ASCII)
    if found is not None:
        # The package is found without importing it, because it may need libraries that are not installed.
        imports = {"importlib.util": ["find_spec"], "pathlib": ["Path"], **imports}
        parents, _, name = (found[2] or "").strip("/").rpartition("/")
        is_file = name.endswith(".gguf")
        parts = [quote_python(part) for part in (*parents.split("/"), "" if is_file else name) if part]
        package = f"find_spec({quote_python(found[1])}).submodule_search_locations[0]"
        lines = [f"folder = Path({', '.join([package, *parts])})"]
        arguments = ["folder", *([f"gguf_file={quote_python(name)}"] if is_file else [])]
    if "dtype" in base:
        arguments.append(f"dtype={quote_python(base['dtype'])}")
    lines.append(f"base = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})")
    lines.append(f"model = PeftModel.from_pretrained(base, {quote_python(place)})")
    return Opening(imports=imports, lines=lines)


def format_opening(opening: Opening, *, place: str, task: str) -> str:
    """Return a program that opens a model, asks it, and prints what it writes.

    Args:
        opening: how the model is opened.
        place: where its tokenizer is.
        task: the task of the recipe, one of `OPENED_TASKS`.
    """
    imports = {**opening.imports, "transformers": sorted({*opening.imports.get("transformers", ()), "AutoTokenizer"})}
    ask = 'tokenizer("A text as the template of the recipe writes it", return_tensors="pt")'
    if task == "chat":
        ask = (
            'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Good morning"}],\n'
            '    add_generation_prompt=True, return_tensors="pt", return_dict=True,\n)'
        )
    lines = [
        *(f"from {module} import {', '.join(imports[module])}" for module in sorted(imports)),
        "",
        *opening.lines,
        f"tokenizer = AutoTokenizer.from_pretrained({quote_python(place)})",
        f"inputs = {ask}",
        "output = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)
