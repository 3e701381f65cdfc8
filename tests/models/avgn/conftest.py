"""A glance network of a few thousand parameters, and videos for it."""

import pytest
import torch

from models.avgn.audio import LogMel
from models.avgn.encoders import SmallConvNet
from models.avgn.network import AVGN


def small_network(**settings) -> AVGN:
    torch.manual_seed(0)
    given = {
        "num_classes": 5, "image_size": 32, "patch_size": 16, "num_selected": 3, "max_steps": 6, "order": "saliency", "dim": 16,
        "max_snippets": 6, "policy_hidden": 8, "mlp_width": 12,
    }  # fmt: skip
    network = AVGN(
        SmallConvNet([4, 6]),
        SmallConvNet([4, 5], channels=1),
        SmallConvNet([4, 7], pool=True),
        LogMel(8000, 0.16, 256, 200, 80, 16, 0, 4000, 16),
        **{**given, **settings},
    )
    torch.nn.init.normal_(network.avtest.head[2].weight)  # scores that differ
    return network.eval()


@pytest.fixture
def network():
    return small_network()


@pytest.fixture
def videos():
    """Frames (4, 6, 3, 32, 32) uint8, sound (4, 6, 1280), all heard."""
    draw = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (4, 6, 3, 32, 32), generator=draw, dtype=torch.uint8)
    return frames, torch.rand(4, 6, 1280, generator=draw) - 0.5, torch.ones(4, dtype=torch.bool)
