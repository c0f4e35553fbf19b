"""Vision-language models: the language model is quantized, what looks at pictures stays as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from tests.builders import read_tensors, write_checkpoint
from tests.engines.families import assert_awq_is_close, assert_loads, assert_selection, convert, save
from tests.engines.moe_families import assert_dims
from tests.engines.multimodal_families import CASES, CLIP

every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One checkpoint a family, under Hub names: transformers 5 saves CLIP's and SigLIP's without `vision_model`."""

    class Made(dict):
        def __missing__(self, name: str) -> Path:
            saved = save(CASES[name], tmp_path_factory.mktemp(name) / "saved")
            config = json.loads((saved / "config.json").read_text())
            flat = config["vision_config"]["model_type"] in ("clip_vision_model", "siglip_vision_model")
            root = f"{CLIP}." if flat else "vision_tower."
            own = {key.replace("vision_tower.", root): tensor for key, tensor in read_tensors(saved).items()}
            self[name] = write_checkpoint(saved.with_name("hub"), own, config)
            return self[name]

    return Made()


@every_case
def test_selection(name: str, folders: Mapping[str, Path]):
    assert_selection(CASES[name], folders[name], group_size=32, format="compressed-tensors")


@every_case
def test_config_says_the_shapes_of_the_language_model(name: str, folders: Mapping[str, Path]):
    assert len(assert_dims(folders[name])) == 2


@every_case
def test_transformers_loads(name: str, folders: Mapping[str, Path], tmp_path):
    """Of text alone: pictures go through towers that are the same tensors in both."""
    assert_loads(CASES[name], folders[name], tmp_path)


@every_case
def test_awq(name: str, folders: Mapping[str, Path], tmp_path):
    assert_awq_is_close(folders[name], convert(folders[name], tmp_path / "awq", format="awq"))


@every_case
@pytest.mark.parametrize("format", ["compressed-tensors", "awq"])
def test_what_looks_at_pictures_is_the_same_tensor(name: str, format: str, folders: Mapping[str, Path], tmp_path):
    before = read_tensors(folders[name])
    after = read_tensors(convert(folders[name], tmp_path / "out", format=format))
    seen = [key for key in before if key.startswith(("vis", "multi", "model.vis", "image"))]
    assert len(seen) > 8
    assert all(torch.equal(after[key], before[key]) for key in seen)
