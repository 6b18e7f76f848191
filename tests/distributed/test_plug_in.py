"""The tutorial runs as it is written, and TorchRec's own planner takes our tables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import thresher
from tests.distributed.conftest import make_spec
from tests.distributed.ranks import free_port, run_ranks
from thresher.embedding.sharding import collection_of
from thresher.train.group import process_group

DOCUMENT = Path(__file__).parents[2] / "docs" / "plug-in.md"
SCRIPT, SERVING = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
END = "dist.destroy_process_group()\n"

# What the tutorial left, looked at before its processes end.
CHECK = """
import thresher.tables
from thresher.embedding.sharding import collection_of

exported = thresher.tables.load("tables")
assert sum(table.kept for table in exported.tables.values()) == sum(ROWS.values()) * 8 // 5
for name, rows in ROWS.items():
    lengths = torch.cat([torch.full((rows,), int(key == name)) for key in ROWS])
    with torch.no_grad():
        trained = collection_of(model)(KeyedJaggedTensor(list(ROWS), torch.arange(rows), lengths=lengths))[name]
    found = exported.embed({name: (np.arange(rows), np.arange(rows + 1))})[name]
    assert np.array_equal(found, trained.half().float().numpy())
    kept = np.unpackbits(scheme.masks[name], axis=1, bitorder="little")
    assert 0 < kept.sum() < kept.size
    assert not found[kept == 0].any()
dense = {key: p for key, p in model.named_parameters() if "embedding_bag" not in key}
assert dense.keys() == exported.dense.keys()
dist.barrier()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_tutorial_runs_and_exports_what_it_trained(ranks: int, tmp_path: Path) -> None:
    assert SCRIPT.endswith(END)
    (tmp_path / "plug_in.py").write_text(SCRIPT.removesuffix(END) + CHECK + END)
    (tmp_path / "serving.py").write_text(SERVING + "\nimport sys\nassert 'torch' not in sys.modules\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    ours = {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | ours
    for command in ([*torchrun, "plug_in.py"], ["serving.py"]):
        ended = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, timeout=100, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.startswith("(2, 8) ")
    assert thresher.Scheme.load(tmp_path / "scheme.safetensors").budget == 0.2


def default_plan() -> dict[str, Any]:
    """A model under the plan that TorchRec makes by itself."""
    with process_group(make_spec("unused")) as ranks:
        tables = [
            EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=rows, embedding_dim=8)
            for name, rows in (("a", 5000), ("b", 9))
        ]
        model = nn.ModuleDict({"tables": EmbeddingBagCollection(tables, device=torch.device("meta"))})
        thresher.replace(model, thresher.SoftThreshold())
        sharded = DistributedModelParallel(model, device=ranks.device, sharders=[thresher.Sharder()])
        collection = collection_of(sharded)
        features = KeyedJaggedTensor(["a", "b"], torch.tensor([4999, 3]), lengths=torch.tensor([1, 1]))
        out = collection(features).values()
        out.sum().backward()
        seen = torch.tensor(sum(int(kernel.group.seen.sum()) for kernel in collection.kernels()))
        dist.all_reduce(seen)
        assert int(seen) >= 2
        return {name: own.sharding_type for name, own in collection.module_sharding_plan.items()}


def test_torchrecs_own_plan_shards_our_tables() -> None:
    first, second = run_ranks(2, default_plan)
    assert first == second
    assert set(first) == {"a", "b"}
