"""A source behind `s3://`, of moto's server and s3fs, which have an environment of their own (`.ci/run`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import quantconvert
from tests.builders import llama_tensors, write_checkpoint
from tests.snapshots import digests

moto_server = pytest.importorskip("moto.server", reason="of an environment of its own: .ci/run")
s3fs = pytest.importorskip("s3fs", reason="of an environment of its own: .ci/run")
pytestmark = pytest.mark.process


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The endpoint of an empty store, for everything in this process."""
    server = moto_server.ThreadedMotoServer(port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": endpoint,
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield endpoint
    server.stop()


def test_a_source_on_s3(store: str, tmp_path: Path):
    source = write_checkpoint(tmp_path / "in", llama_tensors(hidden=512, intermediate=1024), shards=2)
    files = s3fs.S3FileSystem()
    files.mkdir("models")
    files.put(str(source), "models/big", recursive=True)
    quantconvert.convert(source, tmp_path / "local")
    quantconvert.convert("s3://models/big", tmp_path / "out", verify=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "local")
    report = (tmp_path / "out" / "quantconvert.json").read_text() + (tmp_path / "out" / "README.md").read_text()
    assert "s3://" not in report
    assert "secret" not in report
    with pytest.raises(quantconvert.QuantConvertError, match="s3://models/other"):
        quantconvert.plan("s3://models/other")
