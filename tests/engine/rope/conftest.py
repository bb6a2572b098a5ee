"""Small models of one architecture and the same weights, that differ in their rotary embeddings."""

from __future__ import annotations

import pytest

from tests.engine.harness import load
from tests.engine.rope.texts import FACTORS, OWN
from tests.models_zoo import save_tiny

ROPES = {
    "default": {},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": OWN},
    "dynamic": {"factor": 4.0},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": OWN, **FACTORS},
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One folder for each of ``ROPES``, with the same weights, trained for ``OWN`` positions."""
    found = {}
    for kind, more in ROPES.items():
        length = 4 * OWN if kind in ("yarn", "longrope") else OWN
        rope = {"rope_type": kind, "rope_theta": 10000.0, **more}
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = save_tiny("llama", folder, max_position_embeddings=length, rope_parameters=rope)
    return found


@pytest.fixture(scope="session")
def models(folders):
    return {kind: load(folder) for kind, folder in folders.items()}
