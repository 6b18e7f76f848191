"""The report of a finished run: what it says, that it says it of half a run too, and the page in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.pipeline.report_run import write_run
from thresher import rundir
from thresher.stages import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def page(run_dir: Path, **changes: object) -> str:
    """The report of a made-up run."""
    report.run(write_run(run_dir, **changes))  # type: ignore[arg-type]
    return (run_dir / "report.html").read_text()


def text_of(html: str) -> str:
    """What a reader sees, on one line."""
    parts: list[str] = []

    class Text(HTMLParser):
        def handle_data(self, data: str) -> None:
            parts.append(data)

    Text().feed(html)
    return re.sub(r"\s+", " ", " ".join(parts)).replace("\N{NO-BREAK SPACE}", " ")


def test_the_verdict_is_about_the_smallest_budget_that_held_the_accuracy(tmp_path: Path) -> None:
    words = text_of(page(tmp_path, auc_changes=[0.002, 0.0003, -0.0031, -0.0105]))
    assert re.search(r"At 20 % of the parameters the test AUC is 0\.\d{4}, 0\.0003 above the uniform model", words)
    assert re.search(r"Accuracy was lost at .*5 %", words)


def test_the_verdict_says_so_where_every_budget_lost(tmp_path: Path) -> None:
    words = text_of(page(tmp_path, auc_changes=[-0.003, -0.01, -0.02, -0.03]))
    assert "0.0030 below the uniform model" in words


def test_the_page_names_the_model(tmp_path: Path) -> None:
    spec = write_run(tmp_path)
    rows = [row | {"model": "towers.two:create"} for row in rundir.read_json(tmp_path / "metrics.json")]
    rundir.write_json(tmp_path / "metrics.json", rows)
    report.run(spec)
    assert "<span>towers.two:create</span>" in (tmp_path / "report.html").read_text()


def test_the_page_says_where_a_budget_is_not_met_exactly_and_what_sseds_cost(tmp_path: Path) -> None:
    spec = write_run(tmp_path)
    file = tmp_path / "schemes" / "0.2" / "scheme.json"
    scheme = rundir.read_json(file)
    rundir.write_json(file, scheme | {"wanted_params": scheme["kept_params"] + 7, "why_not_exact": "a column is 9"})
    (tmp_path / "search" / "history.json").unlink()
    found = {"method": "sseds", "batches": 4, "seconds": 0.05, "training_steps_worth": 3.2}
    rundir.write_json(tmp_path / "search" / "search.json", found)
    report.run(spec)
    words = text_of((tmp_path / "report.html").read_text())
    assert re.search(r"At 20 %, \S+( K)? parameters stay where \S+( K)? were allowed: a column is 9\.", words)
    assert "SSEDS looked once at 4 batches" in words
    assert "it took 0.05 s, as long as 3.2 training steps" in words


def test_every_row_of_the_metrics_is_in_the_table(tmp_path: Path) -> None:
    words = text_of(page(tmp_path))
    for row in rundir.read_json(tmp_path / "metrics.json"):
        if row["split"] == "test":
            assert f"{row['auc']:.4f}" in words


def test_the_page_stands_alone(tmp_path: Path) -> None:
    html = page(tmp_path)
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", html)
    assert "@import" not in html
    assert not re.findall(r"url\((?!#)", html)
    assert html.count("<svg") >= 10
    assert all("aria-label" in svg or "<title" in svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    spec = write_run(tmp_path)
    report.run(spec)
    first = (tmp_path / "report.html").read_bytes()
    report.run(spec)
    assert (tmp_path / "report.html").read_bytes() == first


@pytest.mark.parametrize("missing", ["search", "schemes", "tables", "data", "models", "spec.json", "baseline"])
def test_what_is_missing_is_left_out(missing: str, tmp_path: Path) -> None:
    spec = write_run(tmp_path)
    path = tmp_path / missing
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    report.run(spec)
    assert "AUC" in text_of((tmp_path / "report.html").read_text())


def test_without_metrics_it_names_the_stage_to_run(tmp_path: Path) -> None:
    spec = write_run(tmp_path)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"metrics\.json.*evaluate"):
        report.run(spec)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_all_figures_and_asks_for_nothing(width: int, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    html = page(run_dir)
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900", "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000", "--dump-dom",
            (run_dir / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.count("<svg") == html.count("<svg")
    assert text_of(done.stdout)[:200].strip()
    assert "CONSOLE" not in done.stderr
    assert "ERR_" not in done.stderr
