"""The batch keys of manipulation detection."""

# The four manipulations by their names in DGM4's ``fake_cls``, in the order of MULTI_LABEL's columns.
MANIPULATIONS = ("face_swap", "face_attribute", "text_swap", "text_attribute")
FAKE = "fake"  # (B,) int64, 1 where the pair was manipulated
MULTI_LABEL = "multi_label"  # (B, C) int64 of 0 and 1
BOX = "box"  # (B, 4) float32 centre x, centre y, width, height as shares of the image; zeros where there is none
TOKEN_LABELS = "token_labels"  # (B, L') int64 class of each token, -100 where there is none
