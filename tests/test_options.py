"""Options are declared once: what is derived from the table agrees with it, and types reach the user."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest

import quantconvert
from quantconvert import api
from quantconvert.cli.parameters import command_of
from quantconvert.cli.words import SOURCE, Command
from quantconvert.job import BASE_OPTIONS, Job
from quantconvert.options import ConvertOptions, JobOptions, Option, check_values, parse_size, read_group, size_text
from quantconvert.recipe import read_recipe, write_recipe

ROOT = Path(__file__).parent.parent
# A value that differs from the default, for every option of a job.
OTHER: dict[str, Any] = {
    "bits": 8, "group_size": 64, "symmetric": False, "scheme": "W8A8:tensor", "format": "gptq", "engines": ("vllm",),
    "method": "other", "equalize": True, "steps": ("x",), "statistics": "a/b.safetensors",
    "ignore": ("*.a b*",), "rules": ("*.x=W8A16", "re:y'=skip"), "preset": "down-8",
    "target_bits": 4.25,
    "tensor_parallel": 2, "on_indivisible": "skip", "nan_policy": "keep", "requantize": True, "strict": True,
    "allow_incomplete": True, "allow_kept_experts": True, "smooth": 0.5, "rotate": "r1,r2",
    "max_shard_size": "123KB", "memory_limit": "1GiB", "workers": 3, "executor": "other", "base_model": "a/b",
}  # fmt: skip


def test_a_job_has_a_field_an_option() -> None:
    """An option without a field would be taken and forgotten; a field without an option could not be set."""
    fields = {field.name for field in dataclasses.fields(Job)}
    assert fields == (set(read_group(JobOptions)) - set(BASE_OPTIONS)) | {"base", "operation", "dtype", "activations"}
    assert set(OTHER) == set(read_group(JobOptions)), "a new option needs a value here"


@pytest.mark.parametrize("name", OTHER)
def test_an_option_survives_every_way_round(name: str, tmp_path: Path) -> None:
    """Library, what was asked, recipe, JSON: the same job each time."""
    option = read_group(JobOptions)[name].option
    job = Job.from_options({name: OTHER[name]})
    assert job != Job.from_options({})
    assert Job.from_options(job.asked()) == job
    if option.in_recipe:
        (tmp_path / "recipe.toml").write_text(write_recipe(job, job.format))
        assert Job.from_options(read_recipe(tmp_path / "recipe.toml")) == job
    changes = option.changes or name in BASE_OPTIONS
    assert (job.to_json() != Job.from_options({}).to_json()) == changes
    assert bool(job.words()) == (changes or option.in_card)
    assert len(job.words()) in (0, *range(1, 5))


@pytest.mark.parametrize(
    ("base", "rule", "label"),
    [
        ("W4A8:g64", "W8A16", "int8 g64"),
        ("W4A8", "W8A8", "int8 per channel symmetric, int8 activations"),
        ("W8A8", "W4A8", "int4 g128 symmetric, int8 activations"),
        ("W8A8", "W4A8:channel", "int4 per channel symmetric, int8 activations"),
    ],
)
def test_an_open_width_of_a_rule_is_the_job_s(base: str, rule: str, label: str) -> None:
    request = Job.from_options({"scheme": base}).request(rule)
    assert request
    assert request.label.removesuffix(" symmetric") == label


def test_w4a8_has_no_scale_for_a_whole_tensor() -> None:
    with pytest.raises(quantconvert.UsageError, match="--scheme: W4A8 has scales by group or channel"):
        Job.from_options({"scheme": "W4A8", "group_size": 0})
    with pytest.raises(quantconvert.UsageError, match="unknown scheme `w4a8-64`") as caught:
        Job.from_options({"scheme": "w4a8-64"})
    assert str(caught.value.hint).startswith("did you mean `W4A8:g64`?")


def test_defaults_are_the_table_s() -> None:
    given = {name: value.option.default for name, value in read_group(JobOptions).items()}
    assert Job.from_options(given) == Job.from_options({}) == Job.from_options(dict.fromkeys(given))
    assert Job.from_options({}).words() == []
    assert Job.from_options({}).asked() == {}


@pytest.mark.parametrize(
    "name", ["plan", "convert", "finish", "repack", "dequantize", "verify", "inspect", "iter_quantized"]
)
def test_the_library_refuses_what_it_does_not_know(name: str, tmp_path: Path) -> None:
    """Every function has its keywords from the table."""
    words = {"repack": (tmp_path, tmp_path, "rtn"), "convert": (tmp_path, tmp_path), "dequantize": (tmp_path, tmp_path)}
    with pytest.raises(quantconvert.UsageError, match="unknown option `colour`"):
        list(getattr(api, name)(*words.get(name, (tmp_path,)), colour="red") or ())
    if name in ("repack", "dequantize"):
        with pytest.raises(quantconvert.UsageError, match="unknown option `bits`"):
            getattr(api, name)(*words[name], bits=4)


def test_repack_and_dequantize_read_a_folder_inside(tmp_path: Path) -> None:
    from tests.builders import write_checkpoint

    write_checkpoint(tmp_path / "plain")
    quantconvert.convert(tmp_path / "plain", tmp_path / "pipeline" / "text_encoder", group_size=32)
    quantconvert.repack(tmp_path / "pipeline", tmp_path / "a", "compressed-tensors", subfolder="text_encoder")
    quantconvert.dequantize(tmp_path / "pipeline", tmp_path / "b", subfolder="text_encoder")
    assert quantconvert.verify(tmp_path / "a").is_ok
    assert (tmp_path / "b" / "config.json").exists()
    with pytest.raises(quantconvert.CheckpointError, match="--revision x is for Hub repositories"):
        quantconvert.repack(tmp_path / "pipeline", tmp_path / "c", "gptq", revision="x")


class Toy(TypedDict, total=False):
    """An option that comes from nowhere else."""

    shade: Annotated[
        str | None,
        Option("A shade.", choices=lambda: ("light", "dark"), default="light", panel="Looks"),
    ]
    depth: Annotated[int, Option("A depth.", least=1, default=2)]


def test_a_new_option_is_one_entry() -> None:
    """Its flag, help, default, completion and check follow from its line."""
    seen: list[dict[str, Any]] = []
    call = command_of(Command("toy", "", [SOURCE], Toy, Toy, lambda name: lambda *words: seen.append(words[1])))
    parameters = inspect.signature(call).parameters
    assert list(parameters) == ["context", "source", "option_shade", "option_depth"]
    info = parameters["option_shade"].annotation.__metadata__[0]
    assert info.param_decls is None or info.param_decls == ()
    assert info.default == "--shade"
    assert info.help == "A shade. [default: light]"
    assert info.metavar == "light|dark"
    assert info.autocompletion("d") == ["dark"]
    assert info.rich_help_panel == "Looks"
    assert check_values(Toy, {"shade": "dark", "depth": 3}) == {"shade": "dark", "depth": 3}
    with pytest.raises(quantconvert.UsageError, match=r"--shade: expected light, dark, got `drak`") as caught:
        check_values(Toy, {"shade": "drak"})
    assert caught.value.hint == "did you mean `dark`?"
    with pytest.raises(quantconvert.UsageError, match="--depth: expected a whole number of at least 1, got True"):
        check_values(Toy, {"depth": True})


def test_every_option_has_words_for_people() -> None:
    for name, declared in read_group(ConvertOptions).items():
        assert declared.help[0].isupper() or ":" in declared.help, name
        assert declared.option.help.endswith("."), name
        assert all(flag.startswith("-") for flag in declared.flags)


@pytest.mark.parametrize("nbytes", [1, 999, 1000, 5_000_000_000, 1 << 30, 123_000])
def test_sizes_are_read_back(nbytes: int) -> None:
    assert parse_size(size_text(nbytes), "--x") == nbytes


USER = """
import quantconvert
rules: list[str] = ["*.down_proj=W8A16"]
plan = quantconvert.plan("m", bits=4, rules=rules, ignore=["a"], on_indivisible="skip", max_shard_size="5GB")
quantconvert.convert("m", "out", engines=["vllm"], revision="main", verify=True)
reveal_type(plan)
"""
WRONG = 'import quantconvert\nquantconvert.plan("m", on_indivisible="pad")\n'


@pytest.mark.process
def test_types_reach_users(tmp_path: Path) -> None:
    """Lists where lists are passed, closed words as literals; in a project that is not this one."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(WRONG)
    words = ["--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache"), "user.py", "wrong.py"]
    env = {"MYPYPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "mypy", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("user.py")] == [
        'user.py:6: note: Revealed type is "quantconvert.planning.plan.Plan"'
    ]
    assert any(line.startswith("wrong.py:2: error: Argument") for line in lines), lines


def test_the_package_says_that_it_is_typed() -> None:
    """And all of it goes into the wheel, as pyproject.toml says."""
    assert (ROOT / "quantconvert" / "py.typed").exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["quantconvert"]}


def test_every_public_name_is_there() -> None:
    for name in quantconvert.__all__:
        assert getattr(quantconvert, name) is not None
    with pytest.raises(AttributeError, match="has no attribute `nothing`"):
        _ = quantconvert.nothing
