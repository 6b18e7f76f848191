"""The model that is served: the current version of a folder, checked before it serves, replaced while others score."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.serve.protocol import EMBEDDING, SCORE
from thresher.serve.publication import content_hash, current
from thresher.tables import Tables, load
from thresher.tables.golden import check_golden

logger = logging.getLogger("thresher.serve")


@dataclass(frozen=True)
class Version:
    """A loaded version.

    Attributes:
        name: SHA-256 of its content, in hexadecimal.
        tables: its tables, which score.
        golden_difference: largest difference of a golden request's score to the trained model's.
        loaded: when, in seconds since 1970.
    """

    name: str
    tables: Tables
    golden_difference: float
    loaded: float

    def infer(self, columns: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
        """The wanted outputs: `score` [B], and `embedding` [B, columns of all fields] in the fields' order.

        Raises:
            ValueError: names the column and what is wrong with it.
        """
        ids = self.tables.ids(columns)
        vectors = self.tables.embed(ids)
        found = {}
        if SCORE in outputs:
            rows = len(next(iter(vectors.values())))
            found[SCORE] = self.tables.score_vectors(vectors, self.tables.numeric(columns, rows))
        if EMBEDDING in outputs:
            found[EMBEDDING] = np.concatenate(list(vectors.values()), axis=1)
        return found


def load_version(folder: Path) -> Version:
    """Load a version, and see that it is whole and scores as the trained model did.

    Raises:
        ValueError: names the file and what is wrong.
    """
    name = content_hash(folder)
    if len(folder.name) == len(name) and folder.name != name:
        raise ValueError(f"{folder}: its files have SHA-256 {name}: they were changed after they were published")
    tables = load(folder)
    return Version(name, tables, check_golden(tables), time.time())


class Model:
    """What a server scores with, and where it looks for newer versions.

    Args:
        name: in URLs.
        folder: as `publication.current` takes it.

    Attributes:
        version: the loaded version; None until the first has passed its golden requests.
        problem: why the newest version is not served; empty where it is.
        switches: versions that were loaded.
        failures: versions that were refused.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.version: Version | None = None
        self.problem = "loading"
        self.switches = self.failures = 0
        self._folder = folder
        self._refused: Path | None = None

    async def watch(self, seconds: float) -> None:
        """Load what is current, now and whenever that changes; requests go on meanwhile.

        Args:
            seconds: between two looks.
        """
        while True:
            await self.refresh()
            await asyncio.sleep(seconds)

    async def refresh(self) -> None:
        """Load what is current, unless that was tried already. One that is refused leaves the old one in place."""
        folder = None
        try:
            folder = current(self._folder)
            if self.version is not None and folder == self.version.tables.folder:
                self.problem, self._refused = "", None
                return
            if folder == self._refused:
                return
            version = await asyncio.to_thread(load_version, folder)
        except Exception as error:  # whatever is wrong with a new version, the old one goes on
            self._refused = folder
            if str(error) != self.problem:
                self.problem = str(error)
                self.failures += 1
                logger.error("not served: %s", error)
            return
        self.version, self.problem, self._refused = version, "", None
        self.switches += 1
        logger.info("serving version %s, golden requests within %.2g", version.name, version.golden_difference)
