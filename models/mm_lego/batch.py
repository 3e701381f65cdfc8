"""The batch keys of patients with several modalities."""

from __future__ import annotations

PRESENT = "present"  # (B, M) bool: which of the data's modalities a patient has, in their order
TIME = "survival_time"  # (B,) float32 months, or another unit, to the event or the last visit
CENSORED = "censored"  # (B,) bool: the last visit, not the event
BIN = "survival_bin"  # (B,) int64 bin of the time
TARGETS = "targets"  # (B, C) float32: 0 or 1 for each label of a multi-label task


def modality_key(name: str) -> str:
    """Key of a modality's inputs, (B, N, W); what stands there for a patient without the modality is not read."""
    return f"modality/{name}"
