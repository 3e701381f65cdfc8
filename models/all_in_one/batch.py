"""The batch keys of All-in-One alone."""

FALSE_VIDEO = "false_video"  # (n, T, 3, H, W): other clips, for the rows of MATCHED that are 0, in their order
FALSE_ROWS = "false_rows"  # (n,) int64 rows of this batch whose clips take the place of FALSE_VIDEO
PIXELS, FALSE_PIXELS = "pixels", "false_pixels"  # (B, 2) int64 real rows and columns of zero-padded VIDEO, FALSE_VIDEO
REASON_IDS, REASON_MASK = "reason_ids", "reason_mask"  # (B, C, L): candidates of a second step (VCR)
IMAGES = "images"  # a batch of still images beside one of clips: co-training
REASON = "reason"  # (B,) int64 candidate of the second step; -100 where unknown
