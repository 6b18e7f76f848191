"""The page for people, in a browser without a window."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import Server, serving
from tests.serve.models import COLUMNS, write_export
from thresher.serve.publication import current
from thresher.tables import load

pytestmark = pytest.mark.timeout(180)
CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")


def shown(server: Server, profile: Path) -> str:
    """The page's DOM, when its requests are done."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    url = f"http://127.0.0.1:{server.port}/"
    command = [CHROMIUM, *options, "--virtual-time-budget=10000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=150).stdout


def text(dom: str, name: str) -> str:
    """The text of the element with an id."""
    found = re.search(rf'<(\w+)[^>]*id="{re.escape(name)}"[^>]*>(.*?)</\1>', dom, re.DOTALL)
    assert found is not None, f"no {name} on the page"
    return html.unescape(re.sub("<[^>]*>", " ", found[2]))


@needs_browser
@pytest.mark.slow
def test_the_page_shows_the_model_and_scores_its_first_example(server: Server, tmp_path: Path) -> None:
    dom = shown(server, tmp_path)
    tables = load(current(server.folder))
    assert text(dom, "title") == "clicks"
    assert text(dom, "what").startswith("logistic, pruned to budget 0.4, seed 0. Golden requests score within ")
    assert text(dom, "version") == current(server.folder).name
    assert text(dom, "card") == "# The card\n"
    (expected, *_) = json.loads((current(server.folder) / "golden.json").read_text())["scores"]
    assert text(dom, "score") == f"score {expected:.6g}"
    vector = tables.lookup("user", [10])[0]
    assert f"{(vector != 0).sum()} of 4" in text(dom, "kept.user")
    assert text(dom, "kept.genres").split()[0] == "Action"
    assert text(dom, "kept.genres").count("4 of 4") == 2
    for name in COLUMNS:
        assert f'name="{name}"' in dom
    assert f'aria-label="{tables.total_bytes:,} bytes"' in dom


@needs_browser
@pytest.mark.slow
def test_the_page_says_why_nothing_is_served(tmp_path: Path) -> None:
    export = write_export(tmp_path / "export")
    (export / "golden.json").write_text("{}")
    with serving(export) as server:
        for _ in range(100):
            if server.ask("GET", "/v2/health/ready")[1]["problem"] != "loading":
                break
        dom = shown(server, tmp_path / "profile")
    assert "No model is served: " in text(dom, "problem")
    assert "must have columns and scores" in text(dom, "problem")


def test_one_sample_is_scored_with_what_its_keys_kept(server: Server) -> None:
    sample = {"user_id": "20", "city": "", "genres": "Drama|Nothing", "age": "33"}
    status, found = server.ask("POST", "/page/score", json.dumps(sample))
    assert status == 200
    assert 0 < found["score"] < 1
    user, city, genres = found["fields"]
    assert [(key["key"], key["known"]) for key in user["keys"]] == [("20", True)]
    assert [key["key"] for key in city["keys"]] == [""]
    assert [(key["key"], key["known"]) for key in genres["keys"]] == [("Drama", True), ("Nothing", False)]
    tables = load(current(server.folder))
    assert user["keys"][0]["vector"] == pytest.approx(tables.lookup("user", [20])[0].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("[]", "the text of each column is wanted"),
        ('{"user_id": 5}', "the text of each column is wanted"),
        ('{"user_id": "5"}', "column 'city' is missing"),
        ('{"user_id": "5", "city": "", "genres": "", "age": "old"}', "column 'age': is numeric"),
    ],
)
def test_a_wrong_sample_is_told(body: str, cause: str, server: Server) -> None:
    status, response = server.ask("POST", "/page/score", body)
    assert status == 400
    assert cause in response["error"]


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    for path in ("/", "/page.js", "/page.css"):
        status, found = server.ask("GET", path)
        assert status == 200
        assert "//" not in found.replace("://www.w3.org", "")
