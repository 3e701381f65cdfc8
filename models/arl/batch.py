"""The batch keys of ARL beside those of the two-tower family."""

from __future__ import annotations

TEXT_ENTITIES = "text_entities"  # (B, n) int64: every entity that the caption names, NO_ENTITY behind the last one
IMAGE_ENTITIES = "image_entities"  # (B, n) int64: every entity that any caption of the image names, likewise


def entity_keys(name: str) -> tuple[str, str]:
    """Keys of the entities (B, M) and of the tokens that they cover (B, M, L), of the texts ``name`` of
    :data:`~models.two_tower.batch.TEXTS`; of candidates (B, C, M) and (B, C, M, L)."""
    return f"{name}_entity_ids", f"{name}_entity_cover"
