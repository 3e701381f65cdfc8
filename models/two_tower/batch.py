"""The batch keys of the two-tower family alone."""

FALSE_IMAGE = "false_image"  # (n, 3, H, W): other images, for the rows of MATCHED that are 0, in their order
SECOND_IMAGE = "second_image"  # (B, 3, H, W): the right one of a pair (NLVR2)
ANSWER_SCORES = "answer_scores"  # (B, answers) float32 in [0, 1]: the soft targets of a question (VQA)
MEDIUM = "medium"  # (B,) int64: the image that a caption belongs to, the same number for captions of one image
