"""Factors move between what gives a vector and what reads it, and no output of any family's model changes by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from quantconvert.families import FAMILIES
from tests.builders import write_checkpoint
from tests.engines.common import load
from tests.engines.families import Case, outputs
from tests.engines.fold_cases import CASES, EXPECTED
from tests.engines.folding import Graph, distance, farthest, graph_of, moved, save_random
from tests.engines.moe_families import FUSED, config_of, hub_config, hub_tensors, join, rewrite

EXACT = 1e-4  # measured: at most 1e-5
SHOWS = 0.05  # measured where a giver is left out: at least 0.19


@pytest.fixture(scope="module", autouse=True)
def a_thread() -> Iterator[None]:
    """On models this small several threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Model:
    """A tiny model: its graph, and how a folder is written of other tensors."""

    case: Case
    graph: Graph
    write: Callable[[Path, dict[str, Tensor]], Path]

    def outputs(self, folder: Path) -> list[Tensor]:
        return outputs(self.case, load(folder, self.case.model))


def saved_as_it_is(case: Case, work: Path) -> Model:
    source = save_random(case, work / "saved")
    config = json.loads((source / "config.json").read_text())
    return Model(case, graph_of(source), lambda folder, tensors: write_checkpoint(folder, tensors, config))


def with_fused_experts(name: str, work: Path) -> Model:
    family = FUSED[name]
    saved = save_random(family.case, work / "saved")
    hub, config = hub_tensors(name, saved), hub_config(name, config_of(saved))
    source = rewrite(saved, work / "hub", hub, config)

    def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
        return rewrite(saved, folder, join(family, hub, tensors), config)

    return Model(family.case, graph_of(source), write)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Mapping[str, Model]:
    class Made(dict[str, Model]):
        def __missing__(self, name: str) -> Model:
            work = tmp_path_factory.mktemp(name.split(",")[0].replace(" ", "-"))
            self[name] = with_fused_experts(name, work) if name in FUSED else saved_as_it_is(CASES[name], work)
            return self[name]

    return Made()


every_case = pytest.mark.parametrize("name", [*CASES, *FUSED])


def test_of_every_case_is_said_what_is_expected():
    assert EXPECTED.keys() == {*CASES, *FUSED}


@every_case
def test_sites(name: str, models: Mapping[str, Model]):
    graph = models[name].graph
    assert {kind: len(names) for kind, names in graph.kinds().items()} == EXPECTED[name]
    assert not graph.notes
    assert len({site.name for site in graph.sites}) == len(graph.sites)


@every_case
def test_outputs_stay(name: str, models: Mapping[str, Model], tmp_path):
    """And would not, if a giver were forgotten: one kind of vector after the other."""
    model = models[name]
    if not model.graph.sites:
        pytest.skip("nothing moves in it")
    expected = model.outputs(model.graph.folder)
    assert farthest(model.outputs(model.write(tmp_path / "moved", moved(model.graph))), expected) < EXACT
    for kind, names in model.graph.kinds().items():
        folder = model.write(tmp_path / kind, moved(model.graph, unmoved=names))
        assert farthest(model.outputs(folder), expected) > SHOWS, kind


# Grouped queries, tied heads, biases, shared experts, norms that store w for 1 + w, LayerNorms with a bias, latent
# attention, gated attention beside a recurrent state.
KINDS = ("llama", "llama tied", "llama biases", "qwen2_moe", "gemma", "phi", "stablelm", "deepseek_v3", "qwen3_next")
NOTHING = 1e-3  # of the error that bfloat16 makes; measured: at most 9e-5


@pytest.mark.parametrize("name", KINDS)
def test_what_moves_is_nothing_beside_the_rounding_of_bfloat16(name: str, models: Mapping[str, Model], tmp_path):
    model = models[name]
    expected = model.outputs(model.graph.folder)
    found = model.outputs(model.write(tmp_path / "moved", moved(model.graph)))
    rounded = outputs(model.case, load(model.graph.folder, model.case.model, dtype=torch.bfloat16))
    ours, theirs = distance(found, expected), distance(rounded, expected)
    print(f"{name}: moved by {ours:.1e}, bfloat16 by {theirs:.1e}: {ours / theirs:.1e}")
    assert ours < NOTHING * theirs


def test_factors_are_none_that_a_bug_would_pass(models: Mapping[str, Model]):
    """Every giver and every reader changes, by factors of which the largest is many times the smallest."""
    graph = models["llama biases"].graph
    tensors = moved(graph)
    changed = {read.name for site in graph.sites for read in (*site.givers, *site.readers)}
    before = {read.name: moved(graph_without_sites(graph))[read.name] for read in graph.reads}
    assert {name for name in tensors if not torch.equal(tensors[name], before[name])} == changed
    assert any(name.endswith("up_proj.bias") for name in changed)
    ratio = (tensors["model.layers.0.input_layernorm.weight"] / before["model.layers.0.input_layernorm.weight"]).abs()
    assert ratio.max() > 10 * ratio.min()


def graph_without_sites(graph: Graph) -> Graph:
    return Graph(graph.folder, graph.reads, (), ())


# Names of the Hub for models that transformers knows by others, and what of theirs is tested by their names.
ALIASES = {"RefinedWeb": "falcon 40b", "RefinedWebModel": "falcon", "kimi_k2": "deepseek_v3", "llama4_text": "llama4"}


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_models_by_other_names(alias: str, name: str, models: Mapping[str, Model], tmp_path):
    graph = models[name].graph
    config = config_of(graph.folder)
    renamed = config | {"model_type": alias, "text_config": config.get("text_config")}
    own: dict[str, Any] = {key: value for key, value in renamed.items() if value is not None}
    folder = rewrite(graph.folder, tmp_path / "renamed", {}, own)
    for path in graph.folder.glob("*.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert [site.name for site in graph_of(folder).sites] == [site.name for site in graph.sites]


def test_every_model_type_of_a_family_with_folds_is_tried():
    import transformers

    tried = set(ALIASES)
    for case in [*CASES.values(), *(fused.case for fused in FUSED.values())]:
        config = getattr(transformers, case.model).config_class(**case.config)
        tried |= {config.model_type, config.get_text_config().model_type}
    tried |= {"gemma3n", "pixtral"}  # one around the language model that is tried, and a tower alone
    promised = {name for family in FAMILIES if family.folds for name in family.model_types}
    assert promised <= tried
    named = {name for family in FAMILIES for fold in family.folds for name in fold.only}
    assert named <= {name for family in FAMILIES for name in family.model_types}


def test_heads_that_the_config_leaves_to_the_model(tmp_path):
    """Gemma 3 4B's says neither how many heads there are nor how wide they are."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    case = Case("Gemma3ForCausalLM", CASES["gemma3"].config | sizes, (), {})
    source = save_random(case, tmp_path / "saved")
    config = {key: value for key, value in config_of(source).items() if key not in sizes}
    tensors = moved(graph_of(source))
    folder = write_checkpoint(tmp_path / "short", moved(graph_without_sites(graph_of(source))), config)
    graph = graph_of(folder)
    assert {kind: len(names) for kind, names in graph.kinds().items()} == EXPECTED["gemma3"]
    found = moved(graph)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    expected = outputs(case, load(folder, case.model))
    again = write_checkpoint(tmp_path / "moved", found, config)
    assert farthest(outputs(case, load(again, case.model)), expected) < EXACT
