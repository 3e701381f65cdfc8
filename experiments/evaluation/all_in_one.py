"""What a clip costs All-in-One."""

from __future__ import annotations

import statistics

from experiments.benchmarks.measure import seconds
from experiments.evaluation.base import SuiteResult, TrainedSplit
from models import batch as keys
from models.all_in_one.cost import multiply_adds


def cost(split: TrainedSplit, repeats: int = 9) -> SuiteResult:
    """GFLOPs of a clip with its text (one multiply-add is two), as computed for token 0, and clips per second, measured.

    Args:
        repeats: forward passes of one batch, whose median time counts; reading is not in it.
    """
    module, model = split.module, split.module.model
    batch = next(split.batches())
    frames, side = batch[keys.VIDEO].shape[1], batch[keys.VIDEO].shape[-1]
    named = (keys.TOKEN_IDS, keys.TOKEN_MASK) if keys.TOKEN_IDS in batch else (keys.CANDIDATE_IDS, keys.CANDIDATE_MASK)
    texts, mask = (batch[key].flatten(0, -2)[:: batch[key][0].numel() // batch[key].shape[-1]] for key in named)
    length = int(mask.sum(dim=1).max())
    patches = (side // model.transformer.patch_size) ** 2

    def encode() -> None:
        model.encode_pair(texts[:, :length], mask[:, :length], module.embed(batch), read="first")

    encode()
    median = statistics.median(seconds(encode, module.device) for _ in range(repeats))
    flops = 2 * multiply_adds(model, frames, length, patches, save=True)
    metrics = {"cost/gflops_per_clip": flops / 1e9, "cost/clips_per_second": len(texts) / median}
    return SuiteResult(metrics, hashes=split.hashes)
