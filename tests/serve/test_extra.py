"""The serving extra alone, in an environment of its own: it scores and serves, and has no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
import venv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.serve.models import COLUMNS, write_export
from thresher.tables.golden import GOLDEN

ROOT = Path(__file__).parents[2]
SERVER = """
import http.client, json, subprocess, sys, time
port = 18765
server = subprocess.Popen([sys.executable, "-m", "thresher.cli", "serve", "--model", sys.argv[1], "--port", str(port)])
try:
    for _ in range(200):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                break
        except OSError:
            pass
        time.sleep(0.1)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("POST", "/page/score", json.dumps({"user_id": "10", "city": "Oslo", "genres": "", "age": "3"}))
    print(json.loads(connection.getresponse().read())["score"])
finally:
    server.terminate()
    server.wait()
"""


def test_the_extra_is_pinned_as_in_the_locks() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    assert len(extra) < 8
    for lock in ("cpu.lock", "cuda.lock"):
        pins = (ROOT / "requirements" / lock).read_text().splitlines()
        assert set(extra) <= set(pins), lock


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_extra_alone_scores_and_serves(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "service", source / "service", ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    asked = subprocess.run(
        [*pip, "download", "--no-deps", "--dest", tmp_path, "msgspec==0.22.0"], capture_output=True, env=environment
    )
    if asked.returncode != 0:
        pytest.skip("needs a package index that pip can reach")
    subprocess.run([*pip, "install", "--quiet", f"{source}[serve]"], check=True, env=environment)
    listed = subprocess.run([*pip, "list", "--format=json"], capture_output=True, check=True, env=environment).stdout
    names = {package["name"] for package in json.loads(listed)}
    assert not {name for name in names if "torch" in name or "fbgemm" in name}
    export = write_export(tmp_path / "export")
    pq.write_table(pa.table(COLUMNS), tmp_path / "samples.parquet")
    command = [python, "-m", "thresher.cli", "score", export, tmp_path / "samples.parquet"]
    scored = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout
    expected = json.loads((export / GOLDEN).read_text())["scores"]
    np.testing.assert_allclose([float(line) for line in scored.split()], expected, rtol=0, atol=1e-6)
    command = [python, "-c", SERVER, export]
    served = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout
    assert 0 < float(served) < 1
