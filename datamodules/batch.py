"""The one vocabulary of batch keys, and what a dataset returns for a sample it cannot give.

Every batch is a dict. It always holds ``INDEX``: the global row of each sample in its split, so that errors, pictures
and feature stores can name a sample.
"""

from __future__ import annotations

from typing import NamedTuple

INDEX = "index"  # (B,) int64
KEY = "key"  # list of B str: the sample's name on disk
IMAGE = "image"  # (B, 3, H, W) float32 after the encoder's preprocessing
TOKENS = "tokens"  # dict of (B, L) int64: what a text encoder takes
CAPTIONS = "captions"  # list of B lists of str, the first one the raw caption
LABEL = "label"  # (B,) int64 class index
IMAGE_FEATURES = "image_features"  # (B, Dv) frozen features
TEXT_FEATURES = "text_features"  # (B, Dt) frozen features of the first caption
SKIPPED = "skipped"  # list of Skipped: rows of this batch that could not be read and are not in it
FRAMES = "frames"  # (B, T, 3, H, W) uint8 RGB of a video's snippets
TIMES = "times"  # (B, T) float32 seconds of the frames
AUDIO = "audio"  # (B, T, n) float32 in [-1, 1]: the sound around each frame
AUDIO_VALID = "audio_valid"  # (B,) bool: whether the video has sound; where not, AUDIO is 0
LABELS = "labels"  # (B, L) int64: all labels of a sample, padded with -1
EXTRA_TEXT_FEATURES = "extra_text_features"  # (B, Dt) frozen features of a second positive caption of the same image
IMAGE_TOKENS = "image_tokens"  # (B, P, Dv) frozen tokens, prefix tokens (CLS, registers) first
TEXT_TOKENS = "text_tokens"  # (B, L, Dt) frozen tokens of the first caption, zeros beyond its own
TEXT_MASK = "text_mask"  # (B, L) bool, True where a token is real
IMAGE_LAYERS = "image_layers"  # (B, n_layers, Dv) pooled features of every layer
TEXT_LAYERS = "text_layers"  # (B, n_layers, Dt) likewise of the first caption
EXTRA_TEXT_TOKENS = "extra_text_tokens"  # these three: of the second positive caption
EXTRA_TEXT_MASK = "extra_text_mask"
EXTRA_TEXT_LAYERS = "extra_text_layers"
STRUCTURE_IMAGE, STRUCTURE_TEXT = "structure_image", "structure_text"  # (m, D) frozen features, for the regulariser alone

TOKEN_IDS = "token_ids"  # (B, L) int64, 0 at padding
TOKEN_MASK = "token_mask"  # (B, L) int64, 1 at tokens
TOKEN_LABELS = "token_labels"  # (B, L') int64 class of each token, -100 where there is none
FAKE = "fake"  # (B,) int64, 1 where the pair was manipulated
MULTI_LABEL = "multi_label"  # (B, C) int64 of 0 and 1
BOX = "box"  # (B, 4) float32 centre x, centre y, width, height as shares of the image; zeros where there is none

VIDEO = "video"  # (B, T, 3, H, W) float32
FALSE_VIDEO = "false_video"  # (n, T, 3, H, W): other clips, for the rows of MATCHED that are 0, in their order
FALSE_ROWS = "false_rows"  # (n,) int64 rows of this batch whose clips take the place of FALSE_VIDEO
MATCHED = "matched"  # (B,) int64: 1 where text and clip belong together
MASKED_IDS, MASKED_LABELS = "masked_ids", "masked_labels"  # (B, L) int64; labels are -100 where nothing is masked
CANDIDATE_IDS, CANDIDATE_MASK = "candidate_ids", "candidate_mask"  # (B, C, L): texts to choose from
REASON_IDS, REASON_MASK = "reason_ids", "reason_mask"  # (B, C, L): candidates of a second step (VCR)
PIXELS, FALSE_PIXELS = "pixels", "false_pixels"  # (B, 2) int64 real rows and columns of zero-padded VIDEO, FALSE_VIDEO
IMAGES = "images"  # a batch of still pictures beside one of clips: co-training
ANSWER, REASON = "answer", "reason"  # (B,) int64 class or candidate; -100 where unknown

VIEW_GRID = "view_grid"  # (B, Z, rows, cols, 2) where bird's-eye cells appear in IMAGE, normalised
VIEW_VALID = "view_valid"  # (B, Z, rows, cols) bool: whether they do
TRACES = "traces"  # (B, P, N) float32 ultrasonic envelopes in [0, 1]
CELSIUS = "celsius"  # (B,) float32 air temperature
CALIBRATIONS = "calibrations"  # datamodules.bev.Calibrations of the B samples
BEV_LABEL = "bev_label"  # (B, rows, cols) int64 class of each bird's-eye cell, 255 unknown
CONDITION = "condition"  # list of B str: day, dusk, night or glare


class Skipped(NamedTuple):
    """A sample that could not be read: counted, listed and bounded by the base datamodule and nobody else.

    ``reason`` is ``kind: details``; skips are counted per kind. ``index`` is -1 for what has no row.
    """

    index: int
    key: str
    reason: str
