"""`report`: the numbers of quantconvert.json as page, picture and tables; names from strangers stay text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from math import log10
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import quantconvert
from quantconvert.errors import CheckpointError, OutputError
from quantconvert.pictures.facts import Facts, Place, facts_of, histogram
from quantconvert.pictures.page import page
from quantconvert.pictures.svg import picture
from quantconvert.pictures.words import maps, markdown
from quantconvert.verification.report import report_bytes
from tests.builders import llama_tensors, weight, write_checkpoint

HOSTILE = (
    "model.layers.0.</script><script>alert(1)</script>.weight",
    'model.layers.0.<img src=x onerror="x()">.weight',
)


class Seen(HTMLParser):
    """Every tag with its attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def entry(noise: float, signal: float, role: str = "linear") -> dict[str, Any]:
    """Of a weight of a million."""
    sizes = {"num_elements": 10**6, "source_nbytes": 2 * 10**6, "nbytes": 5 * 10**5}
    return {"scheme": "int4 g128 symmetric", "role": role, **sizes, "noise": noise, "signal": signal}


def facts(tensors: dict[str, dict[str, Any]], **more: Any) -> Facts:
    size = {"source_nbytes": 2 * 10**6 * len(tensors), "nbytes": 5 * 10**5 * len(tensors)}
    return facts_of({"tensors": tensors, "kept": {}, "size": size, "format": "awq", **more}, "out")


def experts(layers: int, count: int) -> Facts:
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{p}" for i in range(layers) for e in range(count) for p in ("up", "down")
    ]
    return facts({f"{name}.weight": entry(1 + i % 7, 100.0, "expert") for i, name in enumerate(names)})


@pytest.fixture
def result(tmp_path: Path) -> Path:
    quantconvert.convert(write_checkpoint(tmp_path / "model"), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("model.layers", 3, "self_attn.q_proj", None)),
        ("model.layers.3.mlp.experts.7.up_proj.weight", ("model.layers", 3, "mlp.experts.*.up_proj", 7)),
        ("decoder.block.2.layer.1.EncDecAttention.q.weight", ("decoder.block", 2, "layer.1.EncDecAttention.q", None)),
        ("lm_head.weight", ("", None, "lm_head", None)),
        ("a.0.weight", ("", None, "a.0", None)),
        (f"a.{'9' * 5000}.b.weight", ("", None, f"a.{'9' * 5000}.b", None)),
        ("a.².b.weight", ("", None, "a.².b", None)),
    ],
)
def test_places(name: str, place: tuple[Any, ...]) -> None:
    assert Place.of(name) == place


def test_cells_are_those_of_the_json(result: Path) -> None:
    """Cell by cell, from sums that quantconvert.json has, and as the page shows them."""
    value = json.loads((result / "quantconvert.json").read_text())
    found = quantconvert.report(result)
    assert len(found.rows) == 7
    shown = page(found)
    for name, tensor in value["tensors"].items():
        place = Place.of(name)
        (row,) = [row for row in found.rows if row.part == place.part]
        sqnr = row.cells[place.layer].sqnr
        assert sqnr is not None
        assert sqnr == pytest.approx(10 * log10(tensor["signal"] / tensor["noise"]))
        assert sqnr == pytest.approx(tensor["sqnr"], abs=0.006)
        assert f"<title>{place.layer} {sqnr:.1f} dB</title>" in shown
    assert found.nbytes == value["size"]["nbytes"]
    assert sum(size.nbytes for size in found.sizes) == found.nbytes
    assert sum(size.source_nbytes for size in found.sizes) == found.source_nbytes


def test_experts_are_summed_and_not_averaged() -> None:
    names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in (0, 1)]
    found = facts({names[0]: entry(1.0, 100.0, "expert"), names[1]: entry(99.0, 100.0, "expert")})
    (row,) = found.rows
    assert row.part == "mlp.experts.*.up_proj"
    assert row.cells[0].sqnr == pytest.approx(10 * log10(2))
    assert row.cells[0].count == 2


def test_bands_of_layers_add_up() -> None:
    found = facts({f"model.layers.{i}.x.weight": entry(i + 1.0, 100.0) for i in range(6)})
    (three,) = maps(found, 3)
    assert three.groups == ("0-1", "2-3", "4-5")
    assert three.bands[0].values[0] == pytest.approx(10 * log10(200 / 3))


def test_a_page_needs_nothing_else(result: Path) -> None:
    text = page(quantconvert.report(result), quantconvert.report(result))
    seen = Seen(text)
    assert not re.findall(r"(?:src|href|action|data|poster|srcset)=\"(?!#)", text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", text)
    assert not {"link", "iframe", "img", "object", "embed", "base", "form"} & {tag for tag, _ in seen.tags}
    (policy,) = [a["content"] for tag, a in seen.tags if tag == "meta" and a.get("http-equiv")]
    assert policy
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not [a for _, a in seen.tags if any(key.startswith("on") or key == "style" for key in a)]


def test_names_of_strangers_stay_text() -> None:
    found = facts({name: entry(1.0, 100.0) for name in HOSTILE}, command="</td><script>x</script>")
    other = facts({name: entry(2.0, 100.0) for name in HOSTILE})
    text = page(found, other)
    seen = Seen(text)
    assert sum(tag == "script" for tag, _ in seen.tags) == 1
    assert not [tag for tag, _ in seen.tags if tag == "img"]
    assert HOSTILE[0] in "".join(seen.text)
    ElementTree.fromstring(picture(found.weights))
    table = markdown(found)
    assert "<script" not in table
    assert all(line.startswith("|") for line in table.splitlines() if line)


def test_a_name_in_json_cannot_end_its_element() -> None:
    name = "model.layers.0.</script><script>.experts.0.up.weight"
    text = page(facts({name: entry(1.0, 100.0, "expert")}))
    assert [a.get("type") for tag, a in Seen(text).tags if tag == "script"] == ["application/json", None]


def test_every_expert_is_in_the_page() -> None:
    seen = Seen(page(experts(2, 3)))
    data = json.loads(next(text for text in seen.text if text.startswith('{"rows"')))
    pairs = data["rows"]["model.layers: mlp.experts.*.up"]["0"]
    assert [int(pairs[i : i + 2], 36) / 10 for i in (0, 2, 4)] == [20.0, 15.2, 13.0]


def test_a_page_of_45_000_weights_is_small() -> None:
    text = page(experts(61, 370))
    assert len(text.encode()) < 300_000


def test_the_same_result_gives_the_same_bytes(result: Path, tmp_path: Path) -> None:
    names = [tmp_path / "a.html", tmp_path / "b.html"]
    for name in names:
        quantconvert.report(result, html=str(name), svg=f"{name}.svg")
    assert names[0].read_bytes() == names[1].read_bytes()
    assert (result / "quantconvert.svg").read_bytes() == Path(f"{names[0]}.svg").read_bytes()
    assert str(tmp_path) not in names[0].read_text()


def test_the_card_shows_the_picture(result: Path) -> None:
    assert "](quantconvert.svg)" in (result / "README.md").read_text()
    assert "quantconvert.svg" in json.loads((result / "quantconvert.json").read_text())["files"]
    assert quantconvert.verify(result).is_ok


def test_of_a_repacked_result_there_is_no_picture(result: Path, tmp_path: Path) -> None:
    quantconvert.repack(result, tmp_path / "again", "compressed-tensors")
    assert "quantconvert.svg" not in (tmp_path / "again" / "README.md").read_text()
    assert not (tmp_path / "again" / "quantconvert.svg").exists()
    found = quantconvert.report(tmp_path / "again")
    assert not found.rows
    assert "SQNR" not in markdown(found)
    assert Seen(page(found)).tags


def test_against_another(result: Path, tmp_path: Path) -> None:
    tensors = llama_tensors() | {"model.layers.0.mlp.up_proj.weight": weight(256, 128, seed=99)}
    quantconvert.convert(write_checkpoint(tmp_path / "b", tensors), tmp_path / "eight", bits=8)
    text = page(quantconvert.report(tmp_path / "eight"), quantconvert.report(result))
    assert "Against" in text
    assert "difference" in text


def test_files_that_are_there_stay(result: Path, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text("mine")
    with pytest.raises(OutputError, match=r"x\.html` exists"):
        quantconvert.report(result, html=str(tmp_path / "x.html"), svg=str(tmp_path / "x.svg"))
    assert (tmp_path / "x.html").read_text() == "mine"
    assert not (tmp_path / "x.svg").exists()
    quantconvert.report(result, html=str(tmp_path / "x.html"), overwrite=True)
    assert (tmp_path / "x.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {"a": {}}}, {"tensors": []}, {"size": 1}, {"kept": {"a": 1}},
        {"tensors": {"a": entry(float("1e400"), 1.0)}}, {"tensors": {"a": entry(-1.0, 1.0)}},
        {"tensors": {"a": entry(1.0, 1.0) | {"nbytes": "1"}}},
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    value = {"tensors": {}, "kept": {}, "size": {"source_nbytes": 1, "nbytes": 1}, "files": {}, **change}
    (tmp_path / "quantconvert.json").write_bytes(report_bytes(value))
    with pytest.raises(CheckpointError, match=r"quantconvert\.json"):
        quantconvert.report(tmp_path)


def test_a_changed_report_is_refused(result: Path) -> None:
    path = result / "quantconvert.json"
    path.write_text(path.read_text().replace('"signal": ', '"signal": 1', 1))
    with pytest.raises(CheckpointError, match="changed after the conversion"):
        quantconvert.report(result)


def test_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no quantconvert\.json"):
        quantconvert.report(write_checkpoint(tmp_path / "model"))


def test_bins() -> None:
    assert histogram([]) == ()
    assert histogram([19.5, 20.0, 20.9]) == ((19, 20, 1), (20, 21, 2))
    wide = histogram([-100.0, 300.0])
    assert len(wide) <= 41
    assert sum(count for _, _, count in wide) == 2
