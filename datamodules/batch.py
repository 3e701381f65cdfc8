"""The one vocabulary of batch keys, and what a dataset returns for a sample it cannot give.

Every batch is a dict. It always holds ``INDEX``: the global row of each sample in its split, so that errors, pictures
and feature stores can name a sample.
"""

from __future__ import annotations

from typing import NamedTuple

INDEX = "index"  # (B,) int64
KEY = "key"  # list of B str: the sample's name on disk
IMAGE = "image"  # (B, 3, H, W) float32 after the encoder's preprocessing
CAPTIONS = "captions"  # list of B lists of str, the first one the raw caption
LABEL = "label"  # (B,) int64 class index
IMAGE_FEATURES = "image_features"  # (B, Dv) frozen features
TEXT_FEATURES = "text_features"  # (B, Dt) frozen features of the first caption
SKIPPED = "skipped"  # list of Skipped: rows of this batch that could not be read and are not in it
EXTRA_TEXT_FEATURES = "extra_text_features"  # (B, Dt) frozen features of a second positive caption of the same image

VIDEO = "video"  # (B, T, 3, H, W) float32
FALSE_VIDEO = "false_video"  # (n, T, 3, H, W): other clips, for the rows of MATCHED that are 0, in their order
FALSE_ROWS = "false_rows"  # (n,) int64 rows of this batch whose clips take the place of FALSE_VIDEO
MATCHED = "matched"  # (B,) int64: 1 where text and clip belong together
TEXT_IDS, TEXT_MASK = "text_ids", "text_mask"  # (B, L) int64 word pieces, 1 at real ones
MASKED_IDS, MASKED_LABELS = "masked_ids", "masked_labels"  # (B, L) int64; labels are -100 where nothing is masked
CANDIDATE_IDS, CANDIDATE_MASK = "candidate_ids", "candidate_mask"  # (B, C, L): texts to choose from
REASON_IDS, REASON_MASK = "reason_ids", "reason_mask"  # (B, C, L): candidates of a second step (VCR)
PIXELS, FALSE_PIXELS = "pixels", "false_pixels"  # (B, 2) int64 real rows and columns of zero-padded VIDEO, FALSE_VIDEO
IMAGES = "images"  # a batch of still pictures beside one of clips: co-training
ANSWER, REASON = "answer", "reason"  # (B,) int64 class or candidate; -100 where unknown


class Skipped(NamedTuple):
    """A sample that could not be read: counted, listed and bounded by the base datamodule and nobody else.

    ``reason`` is ``kind: details``; skips are counted per kind. ``index`` is -1 for what has no row.
    """

    index: int
    key: str
    reason: str
