"""A small sweep for real: two methods, two seeds, in processes of their own; and its page in a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from thresher import rundir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "br", "hr", "img", "input"}
SPEC = """\
data: {format: synthetic, synthetic: {samples: 4000, cardinalities: [200, 50], dimensions: [3, 1]}}
model: {name: fm, dim: 4}
train: {epochs: 2, batch_size: 256}
search: {epochs: 2, check_every: 5}
prune: {budgets: [0.5, 0.2]}
sweep:
  methods:
    entries: {search: {granularity: feature_dimension}}
    columns: {search: {granularity: table_dimension}}
    beyond: {prune: {budgets: [1000000]}}
  seeds: [1, 2]
runtime: {run_dir: RUN, ranks: 1, parallel: 2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a sweep in which one method asks for more than there is."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "spec.yaml").write_text(SPEC.replace("RUN", str(folder / "run")))
    done = sweep(folder)
    assert done.returncode == 1, done.stderr
    return folder / "run"


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "thresher.cli", "sweep", "--spec", str(folder / "spec.yaml"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})


def test_cells_end_well_but_for_the_impossible_ones(folder: Path) -> None:
    found = rundir.read_json(folder / "sweep.json")
    assert found["cells"] == {
        f"fm {method} seed {seed}": "failed" if method == "beyond" else "done"
        for method in ("entries", "columns", "beyond")
        for seed in (1, 2)
    }
    assert all(re.match(r"ValueError: prune\.budgets: .*would keep 1000000", why) for why in found["failures"].values())
    assert [(r["method"], r["budget"], r["auc"]["n"]) for r in found["results"]] == [
        ("uniform", None, 2),
        *((method, budget, 2) for method in ("entries", "columns") for budget in ("0.5", "0.2")),
    ]
    assert all(0.3 < row["auc"] < 1 for row in found["rows"])


def test_uniform_models_are_trained_once_a_seed(folder: Path) -> None:
    shared = sorted(path.name.partition("-")[0] for path in (folder / "shared").iterdir())
    assert shared == ["baseline", "baseline", "data", "data"]
    rows = [row for row in rundir.read_json(folder / "sweep.json")["rows"] if row["budget"] is None]
    for seed in (1, 2):
        assert len({(row["split"], row["auc"], row["seconds"]) for row in rows if row["seed"] == seed}) == 2


def test_a_second_call_tries_the_failed_ones_alone(folder: Path) -> None:
    again = sweep(folder.parent, "sweep.methods.beyond.prune.budgets=[0.3]", "sweep.seeds=[1]")
    assert again.returncode == 0, again.stderr
    assert "2 of 3 cells: done before" in again.stdout
    assert again.stdout.count(": done in") == 1
    assert "fm beyond seed 1: done in" in again.stdout


def test_the_page_is_well_formed_and_stands_alone(folder: Path) -> None:
    html = (folder / "sweep.html").read_text()
    open_tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
            if tag not in VOID:
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Balance().feed(html)
    assert open_tags == []
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", html)
    assert not re.findall(r"url\((?!#)", html)
    assert "<script" not in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert html.count("<svg") == 2
    assert 'aria-label="fm: test AUC against bytes' in html


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_and_asks_for_nothing(folder: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'browser'}", "--window-size=1200,900", "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000", "--dump-dom",
            (folder / "sweep.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.count("<svg") == 2
    assert "CONSOLE" not in done.stderr
    assert "ERR_" not in done.stderr
