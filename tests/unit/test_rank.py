"""What starts a stage on each rank."""

import json
import os
import subprocess
import sys


def test_records_what_ended_it(tmp_path):
    spec, record = tmp_path / "spec.yaml", tmp_path / "error.json"
    spec.write_text("data: {format: synthetic}\n")
    ended = subprocess.run(
        [sys.executable, "-m", "thresher.rank", "train", "--spec", spec, "seed=1", "train.epochs=0"],
        env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(record)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    traceback = json.loads(record.read_text())["message"]["extraInfo"]["py_callstack"]
    assert "override train.epochs=0" in traceback
    assert traceback.splitlines()[-1] in ended.stderr
