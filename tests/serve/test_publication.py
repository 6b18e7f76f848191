"""Publishing: versions named by their content, and readers that see whole ones alone, whatever kills the writer."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.serve.models import COLUMNS, write_export
from thresher.serve.card import model_card
from thresher.serve.model import load_version
from thresher.serve.publication import CARD, content_hash, current, publish
from thresher.tables import load
from thresher.tables.golden import GOLDEN, check_golden


@pytest.fixture
def exports(tmp_path: Path) -> list[Path]:
    return [write_export(tmp_path / f"export{seed}", seed) for seed in range(6)]


def versions(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()}


def test_a_version_is_named_by_its_content(exports: list[Path], tmp_path: Path) -> None:
    to = tmp_path / "published"
    version = publish(exports[0], "# card\n", to, keep=3)
    folder = current(to)
    assert folder == to / version
    assert json.loads((to / "current.json").read_text()) == {"version": version}
    listed = subprocess.run(
        "find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum",
        shell=True, cwd=folder, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert hashlib.sha256(listed).hexdigest() == version
    assert (folder / CARD).read_text() == "# card\n"
    assert load_version(folder).golden_difference < 1e-6
    (exports[0] / "not listed").write_text("x")  # such as stage.json
    assert publish(exports[0], "# card\n", to, keep=3) == version
    assert publish(exports[0], "# another card\n", to, keep=3) != version


def test_old_versions_stay_and_older_ones_go(exports: list[Path], tmp_path: Path) -> None:
    to = tmp_path / "published"
    names = []
    for export in exports:
        names.append(publish(export, "", to, keep=3))
    assert versions(to) == set(names[2:])
    assert publish(exports[2], "", to, keep=3) == names[2]  # back to an old one
    assert current(to).name == names[2]
    publish(exports[0], "", to, keep=1)
    assert versions(to) == {names[0], names[2]}
    publish(exports[1], "", to, keep=0)
    assert versions(to) == {names[1]}
    assert sorted(path.name for path in to.iterdir() if path.name.startswith(".")) == [".lease"]


def test_what_does_not_score_as_the_model_is_not_published(exports: list[Path], tmp_path: Path) -> None:
    golden = exports[0] / GOLDEN
    value = json.loads(golden.read_text())
    value["scores"][2] += 0.01
    golden.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="row 2 scores"):
        publish(exports[0], "", tmp_path / "published", keep=3)
    golden.unlink()
    with pytest.raises(ValueError, match="not there, so nothing says what these tables must score"):
        publish(exports[0], "", tmp_path / "published", keep=3)
    assert not (tmp_path / "published").exists()


def test_one_process_publishes_at_a_time(exports: list[Path], tmp_path: Path) -> None:
    from thresher.rundir import lease

    to = tmp_path / "published"
    with lease(to, "publish"), pytest.raises(ValueError, match="in use by `publish` on"):
        publish(exports[0], "", to, keep=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": "../export0"}', "version '../export0' is not there"),
        ('{"version": "' + "0" * 64 + '"}', "is not there; publish a model again"),
        ('{"version": 5}', "version '5' is not there"),
        ("[]", "version 'None' is not there"),
        ('{"version": ', "not valid JSON"),
    ],
)
def test_a_wrong_current_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "current.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        current(tmp_path)


def test_a_folder_is_an_export_or_published_models(exports: list[Path], tmp_path: Path) -> None:
    assert current(exports[0]) == exports[0]
    with pytest.raises(ValueError, match=r"neither current\.json nor manifest\.json is there"):
        current(tmp_path)


def test_a_version_that_was_changed_is_found(exports: list[Path], tmp_path: Path) -> None:
    version = publish(exports[0], "", tmp_path / "published", keep=3)
    (tmp_path / "published" / version / CARD).write_text("better")
    with pytest.raises(ValueError, match="were changed after they were published"):
        load_version(tmp_path / "published" / version)


def test_the_card_says_what_the_model_is(exports: list[Path]) -> None:
    entries = load(exports[0]).manifest
    rows = [
        {"budget": budget, "split": split, "auc": auc, "logloss": 0.5}
        for budget, auc in ((None, 0.81234), (0.4, 0.80567))
        for split in ("validation", "test")
    ]
    card = model_card(entries, rows, {"format": "parquet", "path": "clicks/"})
    assert "Tables pruned to budget 0.4: " in card
    assert "| test | 0.8057 | 0.5000 | 0.8123 |" in card
    assert f"| {entries.total_bytes:,} |" in card
    assert "| user_id | user | categorical | vocabulary, 5 keys | 6 × 4, " in card
    assert "| age | age | dense number | ln_one_plus | | |" in card
    assert model_card(entries, rows, {"format": "parquet", "path": "clicks/"}) == card


WRITER = """
import sys
from pathlib import Path
from thresher.serve.publication import publish

exports, to = [Path(path) for path in sys.argv[2:]], Path(sys.argv[1])
print("ready", flush=True)
while True:
    for export in exports:
        publish(export, "", to, keep=3)
"""


def test_readers_see_whole_versions_while_writers_are_killed(exports: list[Path], tmp_path: Path) -> None:
    to = tmp_path / "published"
    publish(exports[0], "", to, keep=1)
    chance = random.Random(1)
    seen: set[str] = set()
    for first in range(1, 6):
        order = exports[first:] + exports[:first]
        command = [sys.executable, "-c", WRITER, str(to), *map(str, order)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        before, until = current(to).name, float("inf")
        while time.monotonic() < until:
            folder = current(to)
            if folder.name != before and until == float("inf"):
                until = time.monotonic() + chance.uniform(0, 0.1)  # somewhere in the middle of the next ones
            try:
                assert check_golden(load(folder)) < 1e-6
            except (OSError, ValueError):
                # Since we looked four more were published: the folder was whole until it went, and went as one.
                assert not folder.exists()
                continue
            seen.add(folder.name)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        folder = current(to)
        assert content_hash(folder) == folder.name
        assert check_golden(load(folder)) < 1e-6
    assert len(seen) > 2
    last = publish(exports[3], "", to, keep=3)  # what killed writers left is no obstacle
    assert current(to).name == last
    assert sorted(path.name for path in to.iterdir() if path.name.startswith(".")) == [".lease"]
    assert load(current(to)).score(COLUMNS).shape == (5,)
