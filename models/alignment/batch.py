"""The batch keys of projector alignment: frozen features."""

IMAGE_FEATURES = "image_features"  # (B, Dv) frozen features
TEXT_FEATURES = "text_features"  # (B, Dt) frozen features of the first caption
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
