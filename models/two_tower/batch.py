"""The batch keys of the two-tower family alone."""

from models.batch import CANDIDATE_IDS, CANDIDATE_MASK, MASKED_IDS, TOKEN_IDS, TOKEN_MASK

FALSE_IMAGE = "false_image"  # (n, 3, H, W): other images, for the rows of MATCHED that are 0, in their order
FALSE_ROWS = "false_rows"  # (n,) int64 rows of this batch whose images take the place of FALSE_IMAGE
SECOND_IMAGE = "second_image"  # (B, 3, H, W): the right one of a pair (NLVR2)
QUESTION_IDS, QUESTION_MASK = "question_ids", "question_mask"  # (B, L): a question, hypothesis or sentence about the image
ANSWER_SCORES = "answer_scores"  # (B, answers) float32 in [0, 1]: the soft targets of a question (VQA)
MEDIUM = "medium"  # (B,) int64: number of the image within its split, the same for captions of one image
CAPTION_IDS, CAPTION_MASK = "caption_ids", "caption_mask"  # (M, L): all captions of the images of a batch
CAPTION_OWNER = "caption_owner"  # (M,) int64: the row of the batch that each of them belongs to

TEXTS = {  # name -> ids and mask of the texts of a batch
    "caption": (TOKEN_IDS, TOKEN_MASK),
    "masked": (MASKED_IDS, TOKEN_MASK),
    "question": (QUESTION_IDS, QUESTION_MASK),
    "candidates": (CANDIDATE_IDS, CANDIDATE_MASK),
    "all_captions": (CAPTION_IDS, CAPTION_MASK),
}

# A conversation about an image, of which TOKEN_IDS and TOKEN_MASK hold the tokens, of any id at visual places
TOKEN_LABELS = "token_labels"  # (B, L) int64: the tokens that are to be predicted at their places; IGNORE_INDEX elsewhere
TURNS = "turns"  # (B, L) int64: the number, from 1, of the answer that a token is of; 0 elsewhere and in cut answers
TILES = "tiles"  # (T, 3, H, W): of each sample the whole image, then its tiles; one tensor: each costs a worker a message
TILE_COUNTS = "tile_counts"  # list of B numbers that sum to T; 0 for a text alone
SIZES = "sizes"  # list of B (height, width) in pixels before tiles were made; (0, 0) for a text alone
SPANS = "spans"  # list of B (first visual token, their number)
QUERY_PLACES = "query_places"  # (B, Q) int64: where the first question's own tokens stand, -1 behind the last
