"""Loads a trained model, its tokenizer and its recipe, from a folder or the Hub, without trust in what is there."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_dpzo.card.files import CONFIG_FILES, STATEMENT_FILE
from hf_dpzo.card.repository import MAX_INITIAL_BYTES, fetch_log, from_trajectory
from hf_dpzo.card.schema import check_statement
from hf_dpzo.card.sources import Source, SourceError, open_source
from hf_dpzo.card.use import fingerprint_text
from hf_dpzo.io.foreign import one_sentence
from hf_dpzo.models.float32_residual import keep_residual_in_float32
from hf_dpzo.models.history import mark_origin
from hf_dpzo.models.location import resolve_path
from hf_dpzo.recipe.loading import choose_padding, load_tokenizer
from hf_dpzo.recipe.recipe import Recipe, read_recipe
from hf_dpzo.recipe.saved import restore_recipe
from hf_dpzo.trajectory.base_files import MAX_DOWNLOAD, announce_download
from hf_dpzo.trajectory.earlier_runs import name_log
from hf_dpzo.trajectory.initial import restore_initial_values
from hf_dpzo.trajectory.known_bases import recall_base
from hf_dpzo.trajectory.log import Trajectory
from hf_dpzo.trajectory.replay import build_initial_model, locate_base_model
from hf_dpzo.use.model import TrainedModel, build_missing_recipe
from hf_dpzo.use.tokenizer import holds_tokenizer, load_published_tokenizer
from hf_dpzo.verification.published import INDEX_SUFFIX, holds_weights, list_loaded_files


# More than any file of weights that transformers writes.
_MAX_WEIGHTS_BYTES = 1 << 40


def load(
    name: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    recipe: str | Path | None = None,
    device: str | None = None,
    max_download: int = MAX_DOWNLOAD,
) -> TrainedModel:
    """Load a trained model with its tokenizer and its recipe, so that it answers rows as in training.

    The weights are those that were saved. Where only a log was published, they are replayed from the base model.

    Guarantee: a stranger may have made the folder or the repository. None of its files runs code, or makes this
    process open a file elsewhere; the base model is a commit on the Hub, a file of an installed package, `base`, or
    where this user's own run of that very log found it.

    Args:
        name: a folder, or a repository on the Hub.
        base: the place of the base model. By default the log names it, if it is on the Hub or in a Python package, or
            the recipe's run found it in a folder of this machine.
        revision: a branch, tag or commit of the repository.
        recipe: the YAML file of the recipe that trained it, for a model that was trained before recipes were saved.
        device: the device, such as "cpu" or "cuda:1"; by default a GPU if there is one.
        max_download: the most bytes of a base model that are downloaded because the log names it.

    Returns:
        the model, which has `model`, `tokenizer`, `recipe`, `predict`, `generate` and `evaluate`.

    Raises:
        SourceError: there is no such folder or repository, or its files are not what a run saves.
        TrajectoryError: its log is damaged, or names no base model that can be had.
        ValueError: `recipe` is none, or the log has one.
        OSError: the base model cannot be loaded.
    """
    published = _Published.open(name, base=base, revision=revision, max_download=max_download)
    restored = published.find_recipe(recipe)
    tokenizer = published.load_tokenizer(restored)
    model = published.load_model()
    if restored is not None:
        keep_residual_in_float32(model)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return TrainedModel(
        model=model.to(place).eval(),
        tokenizer=tokenizer,
        recipe=restored,
        calibration=published.log.header.get("calibration"),
        name=str(name),
    )


def read_used_recipe(name: str | Path, *, revision: str | None = None, recipe: str | Path | None = None) -> Recipe:
    """Return the recipe by which a published model answers. No model is loaded to find out; see `load`.

    Raises:
        ValueError: there is none.
    """
    published = _Published.open(name, base=None, revision=revision, max_download=0)
    found = published.find_recipe(recipe)
    if found is None:
        raise build_missing_recipe(str(name))
    return found


@dataclass(frozen=True, kw_only=True)
class _Published:
    """The files of a published model, its log, and where its base model is.

    Args:
        name: the folder or the repository.
        revision: the branch, tag or commit of the repository.
        source: the files.
        folder: the folder of the log.
        log: the log.
        base: the place of the base model; `None` for that in the log.
        max_download: the most bytes of a base model that are downloaded.
    """

    name: str | Path
    revision: str | None
    source: Source
    folder: Path
    log: Trajectory
    base: str | None
    max_download: int

    @classmethod
    def open(cls, name: str | Path, *, base: str | None, revision: str | None, max_download: int) -> "_Published":
        source = open_source(name, revision)
        folder = fetch_log(source)
        log = Trajectory.read(folder)
        return cls(
            name=name,
            revision=revision,
            source=source,
            folder=folder,
            log=log,
            base=base or recall_base(log),
            max_download=max_download,
        )

    def locate_base(self) -> tuple[str, str | None]:
        """Return the place of the base model, and its commit."""
        return (self.base, None) if self.base is not None else locate_base_model(self.log.header)

    def find_recipe(self, path: str | Path | None) -> Recipe | None:
        """Return the recipe of the log, or the one at `path`; `None` if there is none."""
        used = self.log.header.get("recipe")
        if used is not None and path is not None:
            raise ValueError(f"recipe={path}: the log of {self.name} holds the recipe of its run; leave this out.")
        if path is not None:
            # Which rows were trained on says nothing about those that are asked.
            written = read_recipe(path)[0]
            none = dict.fromkeys(("where", "eval_data", "eval_split", "eval_rows", "eval_share", "train_share"))
            return replace(written, **none)
        if used is None:
            return None
        place = self.base or self.log.header["base"]["name"]
        with one_sentence(f"{self.name}: its log holds no recipe that can be used", SourceError, remedy="take it anew"):
            restored = restore_recipe(used, place)
        restored.model_revision = None if self.base is not None else self.log.header["base"]["revision"]
        return restored

    def load_tokenizer(self, recipe: Recipe | None) -> PreTrainedTokenizerBase:
        """Load the tokenizer that was published, or else that of the base model."""
        if holds_tokenizer(self.source):
            tokenizer = load_published_tokenizer(self.source)
        elif recipe is not None and "recipe" in self.log.header:
            self.locate_base()  # It raises an error where the log names no place that may be opened.
            tokenizer = load_tokenizer(recipe)
        else:
            tokenizer = self._load_base_tokenizer()
        if recipe is not None:
            choose_padding(tokenizer, recipe)
        wanted = self.log.header.get("recipe", {}).get("chat_template")
        if wanted is not None and fingerprint_text(str(tokenizer.chat_template)) != wanted:
            raise SourceError(
                f"{self.name}: the chat template of its tokenizer is another one than it was trained with; take an "
                "unchanged copy."
            )
        return tokenizer

    def _load_base_tokenizer(self) -> PreTrainedTokenizerBase:
        place, commit = self.locate_base()
        options = {} if commit is None else {"revision": commit}
        if place.endswith(".gguf"):
            place, _, options["gguf_file"] = place.rpartition("/")
        return AutoTokenizer.from_pretrained(resolve_path(place), trust_remote_code=False, **options)

    def load_model(self) -> torch.nn.Module:
        """Load the weights that were saved, or replay the log that stands for them."""
        if not holds_weights(self.source):
            return from_trajectory(self.name, base=self.base, revision=self.revision, max_download=self.max_download)
        if self.log.header["adapter"] is None and "features" not in self.log.header["base"]:
            model = build_initial_model(str(self._fetch_weights(is_adapter=False)), None, self.log)
        else:
            model = self._load_on_base()
        mark_origin(model, run=name_log(self.log), claim=self._read_claim())
        return model

    def _load_on_base(self) -> torch.nn.Module:
        """Load an adapter or a head, on the base model that the log names."""
        place, commit = self.locate_base()
        if self.base is None:
            announce_download(place, commit, limit=self.max_download)
        is_adapter = self.log.header["adapter"] is not None
        model = build_initial_model(place, commit, self.log)
        restore_initial_values(model, self.folder)
        folder = self._fetch_weights(is_adapter=is_adapter)
        (name,) = list_loaded_files(self.source, adapter=is_adapter)
        _copy_saved(model, folder / name)
        return model

    def _fetch_weights(self, *, is_adapter: bool) -> Path:
        """Fetch the files of the weights, and what transformers reads beside them; return their folder."""
        names = [*list_loaded_files(self.source, adapter=is_adapter)]
        limits = dict.fromkeys(names, MAX_INITIAL_BYTES if is_adapter else _MAX_WEIGHTS_BYTES)
        others = (*CONFIG_FILES, "generation_config.json")
        small = [file for file in self.source.sizes if file in others or file.endswith(INDEX_SUFFIX)]
        return self.source.fetch({**limits, **dict.fromkeys(small, 1 << 24)})

    def _read_claim(self) -> Mapping[str, Any] | None:
        if STATEMENT_FILE not in self.source.sizes:
            return None
        return check_statement(self.source.read_json(STATEMENT_FILE))["claim"]


@torch.no_grad()
def _copy_saved(model: torch.nn.Module, path: Path) -> None:
    """Give `model` the trained values in the file at `path`, which may be a stranger's.

    Raises:
        SourceError: the file does not hold exactly the tensors that the model saves.
    """
    is_adapter = isinstance(model, PeftModel)
    wanted = get_peft_model_state_dict(model) if is_adapter else model.state_dict()
    fault = one_sentence(f"{path.name}: it cannot be read", SourceError, remedy="take it anew")
    with fault, safe_open(path, framework="pt") as file:
        names = {*file.keys()}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        if shapes != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
            raise SourceError(f"{path.name}: it holds other tensors than its log leads to; take it anew.")
        tensors = {name: file.get_tensor(name) for name in names}
    if is_adapter:
        set_peft_model_state_dict(model, tensors)
    else:
        model.load_state_dict(tensors)
