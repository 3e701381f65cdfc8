"""Simulated features: the same for the same arguments, read back by the ordinary reader, and less alike the more nuisance."""

import numpy as np
import pytest
import torch

from datamodules.simulated.features import feature_pairs, make_features
from models.metrics.neighbourhoods import LayerPairs


def test_written_chunks_are_read_back(tmp_path):
    data = feature_pairs(str(tmp_path), pairs=50, per_chunk=16)
    rows = np.array([0, 17, 49])
    made = make_features(50, 1.0)
    for side in ("vision", "text"):
        torch.testing.assert_close(data.encoded(side, rows).float(), made[side][rows], rtol=1e-3, atol=1e-3)
    assert len(list(tmp_path.glob("*/vision/*.pt"))) == 4 and len(data) == 50
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt")}
    assert feature_pairs(str(tmp_path), pairs=50, per_chunk=16).fingerprint == data.fingerprint
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt")}
    assert feature_pairs(str(tmp_path), pairs=50, per_chunk=16, seed=1).fingerprint != data.fingerprint


@pytest.mark.parametrize("nuisance, low, high", [(0.5, 0.7, 0.9), (1.0, 0.4, 0.6), (2.0, 0.03, 0.1)])
def test_agreement_is_what_the_nuisance_says(nuisance, low, high):
    made = make_features(1500, nuisance)
    score = LayerPairs(made["vision"][:, None], made["text"][:, None]).scores().item()
    assert low < score < high
