"""What `observe` does without an engine: refusals before anything is loaded, the file it writes, sums, windows."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import quantconvert
from quantconvert import OutputError, Refusal
from quantconvert.buffers import bytes_of
from quantconvert.checkpoint.header import MAX_NAME_LENGTH
from quantconvert.observation import request
from quantconvert.observation.passes import _each, _joined, _window
from quantconvert.observation.watch import CalledAgain, SharedNotAlways, Sums, Watch
from quantconvert.observation.windows import shape_of
from quantconvert.observation.write import StatisticsFile
from quantconvert.statistics import open_statistics
from tests.builders import write_checkpoint


def test_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With everything else that is wrong, before the source's weights are looked at."""
    monkeypatch.setattr(request, "find_spec", lambda name: None)
    source = write_checkpoint(tmp_path / "in")
    with pytest.raises(Refusal) as caught:
        quantconvert.observe(source, tmp_path / "s.safetensors")
    first, second = caught.value.errors
    assert first.message == "observe runs the model by transformers, which is not installed"
    assert first.hint == "pip install 'quantconvert[engines]'"
    assert second.hint == "--text FILE (of the kind that the model is used for), or --self: it writes its own"


METADATA = {"model_type": "llama", "num_tokens": "1", "inputs": json.dumps({"m": "m", "n": "m"})}


def fill(file: StatisticsFile) -> None:
    for kind, tensor in (("second_moment", torch.ones(4)), ("channel_max", torch.ones(4)), ("max", torch.ones(1))):
        file.add(f"m.{kind}", tuple(tensor.shape), bytes_of(tensor))


def test_the_file_appears_when_it_is_complete(tmp_path: Path):
    path = tmp_path / "s.safetensors"
    with StatisticsFile(path, 3001, overwrite=False) as file:
        fill(file)
        assert not path.exists()
        file.finish(METADATA)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    found = open_statistics(path)
    assert found.second_moment("n") == found.second_moment("m") is not None
    from safetensors.torch import load_file

    assert load_file(path)["m.max"].equal(torch.ones(1))  # others read it too: the header is padded


def test_nothing_is_left_of_a_file_that_is_not_finished(tmp_path: Path):
    def stopped() -> None:
        with StatisticsFile(tmp_path / "s", 3000, overwrite=False) as file:
            fill(file)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not list(tmp_path.iterdir())


def test_a_file_that_came_meanwhile_is_left_alone(tmp_path: Path):
    path = tmp_path / "s"
    with StatisticsFile(path, 3000, overwrite=False) as file:
        fill(file)
        path.write_text("another's")
        with pytest.raises(OutputError, match="exists"):
            file.finish(METADATA)
    assert path.read_text() == "another's"
    with StatisticsFile(path, 3000, overwrite=True) as file:
        fill(file)
        file.finish(METADATA)
    assert open_statistics(path).num_tokens == 1


def test_two_at_once(tmp_path: Path):
    first = StatisticsFile(tmp_path / "s", 3000, overwrite=False)
    with first, pytest.raises(OutputError, match="another process writes"):
        StatisticsFile(tmp_path / "s", 3000, overwrite=False).__enter__()


def test_what_a_kill_left_is_no_obstacle(tmp_path: Path):
    (tmp_path / ".s.partial").write_bytes(b"x" * 10_000)
    with StatisticsFile(tmp_path / "s", 3000, overwrite=False) as file:
        fill(file)
        file.finish(METADATA)
    assert open_statistics(tmp_path / "s").num_tokens == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_the_longest_names_fit_into_the_header(tmp_path: Path):
    """As `record` reserves for them."""
    from quantconvert.observation.record import reserve

    names = {("é" * (MAX_NAME_LENGTH - 20) + f".{i}"): ("é" * (MAX_NAME_LENGTH - 20) + ".0") for i in range(50)}
    names |= {name: name for name in list(names)[::2]}
    with StatisticsFile(tmp_path / "s", reserve(names, list(names)), overwrite=False) as file:
        for key in dict.fromkeys(names.values()):
            for kind, tensor in (("second_moment", torch.ones(4)), ("channel_max", torch.ones(4)),
                                 ("max", torch.ones(1)), ("moments", torch.ones(4, 4))):  # fmt: skip
                file.add(f"{key}.{kind}", tuple(tensor.shape), bytes_of(tensor))
        metadata = METADATA | {"inputs": json.dumps(names), "unobserved": json.dumps(list(names))}
        file.finish(metadata)
    assert dict(open_statistics(tmp_path / "s").inputs) == names


def test_sums():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    sums = Sums.of(5, moments=True)
    sums.add(x[:3])
    sums.add(x[3:])
    found = sums.tensors("m")
    torch.testing.assert_close(found["second_moment"], x.square().mean(0))
    torch.testing.assert_close(found["moments"], x.t() @ x / 7)
    assert found["channel_max"].equal(x.abs().amax(0))
    assert found["max"].equal(x.abs().max().reshape(1))
    sums.add(torch.full((1, 5), torch.inf))
    with pytest.raises(quantconvert.CheckpointError, match="the input of `m` holds NaN or Inf"):
        sums.tensors("m")


def linear(*names: str) -> tuple[Watch, dict[str, torch.nn.Linear]]:
    watch, modules = Watch(moments=False), {name: torch.nn.Linear(4, 4) for name in names}
    watch.add({name: (module, 4) for name, module in modules.items()})
    return watch, modules


def test_inputs_that_are_shared_are_summed_once():
    watch, modules = linear("a.q", "a.k", "a.o")
    x, y = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    for _ in range(2):
        modules["a.q"](x)
        modules["a.k"](x.view(6, 4))
        modules["a.o"](y)
        watch.forget()
    assert watch.inputs == {"a.q": "a.q", "a.k": "a.q", "a.o": "a.o"}
    assert {name: sums.count for name, sums in watch.take().items()} == {"a.q": 12, "a.o": 12}
    with pytest.raises(CalledAgain):
        modules["a.o"](y)


@pytest.mark.parametrize("first", [True, False], ids=["the owner reads more", "the other reads more"])
def test_inputs_that_are_shared_in_some_calls_only(first: bool):
    """Both are found: the sums of one would be taken for those of the other."""
    watch, modules = linear("a.q", "a.k")
    x = torch.ones(2, 4)

    def run() -> None:
        modules["a.q"](x)
        modules["a.k"](x)
        modules["a.q" if first else "a.k"](torch.ones(2, 4))
        watch.forget()

    with pytest.raises(SharedNotAlways) as caught:
        run()
    assert caught.value.kind == "k"


def test_modules_that_are_summed_by_themselves():
    watch, modules = linear("a.q", "a.k")
    watch.alone = frozenset({"k"})
    x = torch.ones(2, 4)
    for module in modules.values():
        module(x)
    watch.forget()
    assert watch.inputs == {"a.q": "a.q", "a.k": "a.k"}


@pytest.mark.parametrize(
    ("tokens", "known", "shape"),
    [(16384, 4096, (32, 512)), (512 * 512, 4096, (511, 512)), (100, 4096, (1, 100)), (600, 128, (4, 128)),
     (1, 8, (1, 1)), (16384, None, (32, 512))],
)  # fmt: skip
def test_windows(tokens: int, known: int | None, shape: tuple[int, int]):
    """As many as there are tokens for, never as many as each is long."""
    text = SimpleNamespace(max_position_embeddings=known)
    assert shape_of(SimpleNamespace(get_text_config=lambda: text), tokens) == shape


def test_one_window_of_everything():
    """Tensors of all windows are cut, what serves all of them is not; answers are put together again."""
    x, mask, position = torch.arange(24.0).view(3, 2, 4), torch.ones(1, 1, 2, 2), torch.arange(3)
    given = {"hidden": x, "more": (mask, [x, None]), "position": position, "flag": True}
    parts = [_each(partial(_window, i, 3), given) for i in range(3)]
    assert parts[1]["hidden"].equal(x[1:2])
    assert parts[1]["more"][0] is mask
    assert parts[1]["more"][1][0].equal(x[1:2])
    assert parts[1]["position"] is position
    whole = _joined([(part["hidden"], None) for part in parts])
    assert whole[0].equal(x)
    assert whole[1] is None
