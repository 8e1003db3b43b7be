"""A saved base model, and what adapters of it are made with."""

from pathlib import Path

import pytest
import torch
from peft import TaskType

from support.models import one_layer


LORA = {"task_type": TaskType.SEQ_CLS, "r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def base(tmp_path) -> Path:
    one_layer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path) -> torch.nn.Module:
    return type(one_layer()).from_pretrained(folder)
