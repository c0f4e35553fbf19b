"""A checkpoint after the steps of a plan and before its codes: what is quantized, as transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantconvert
from quantconvert.buffers import Workspace
from quantconvert.checkpoint import LocalFolder
from quantconvert.checkpoint.ranges import Files
from quantconvert.sources import open_rows
from tests.builders import write_checkpoint
from tests.engines.families import Case


def apply_steps(source: Path, folder: Path, **options: Any) -> Path:
    """Every tensor of the plan of a conversion with `options` in float32, unquantized; returns `folder`."""
    plan = quantconvert.plan(source, **options)
    files, slab = Files(LocalFolder(source)), plan.execution.slab_nbytes
    try:
        tensors = {
            task.source.name: open_rows(task.source, files, Workspace(), slab)
            .rows(0, task.source.matrix[0])
            .reshape(task.source.shape)
            .clone()
            for task in plan.tasks
        }
    finally:
        files.close()
    config = {key: value for key, value in plan.config.items() if key != "quantization_config"}
    return write_checkpoint(folder, tensors, config | {"dtype": "float32"})


def save_float32(case: Case, folder: Path, seed: int = 0) -> Path:
    """The model of a case with random weights, biases and gains, none of which rounding or a symmetry could hide."""
    import transformers

    torch.manual_seed(seed)
    model_class = getattr(transformers, case.model)
    model = model_class(model_class.config_class(**case.config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
            elif parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(std=0.15)
        table = model.get_input_embeddings()
        if table.padding_idx is not None:
            table.weight[table.padding_idx] = 0  # as some models make it whenever they are loaded
    model.float().save_pretrained(folder)
    return folder


def logits(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """[tokens, vocabulary] of fixed token ids, computed in `dtype`, as float32."""
    import transformers

    model = getattr(transformers, case.model).from_pretrained(folder, dtype=dtype).eval()
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found.flatten(0, 1)
