"""The batch keys of self-supervised images.

B images, L local crops, S structures, N patches of a global crop, n masked ones of the batch.
"""

GLOBAL_CROPS = "global_crops"  # (B, 2, 3, H, W) float32, the two views of an image
LOCAL_CROPS = "local_crops"  # (B, L, 3, h, w) float32
MASKS = "masks"  # (B, 2, N) bool, True where the student sees the mask token
MASK_INDICES = "mask_indices"  # (n,) int64 masked places of the masks in the order of the views, see models/rad_dino/model.py
MASK_WEIGHTS = "mask_weights"  # (n,) float32, one over the number of masked patches of the place's crop
REPORT = "report"  # list of B str, empty where an image has none
METADATA = "metadata"  # (B, 3) float32: sex (1 male), view (1 AP), age in years; NaN where unknown
STRUCTURE_MASKS = "structure_masks"  # (B, S, H, W) uint8: 1 inside, 0 outside, VOID_LABEL where the image has no such mask
FINDINGS = "findings"  # (B, C) int64: 1 present, 0 absent, -1 unknown
