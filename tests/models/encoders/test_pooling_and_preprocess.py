"""Pooling rules, and image preprocessing against the libraries' own transforms."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, ViTImageProcessorPil

from models.encoders.pooling import pool_text_tokens, pool_tokens
from models.encoders.preprocess import ImagePreprocess, from_processor_config, from_timm_config


def _photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def test_image_pooling_skips_registers():
    tokens = torch.randn(2, 1 + 4 + 6, 5)  # CLS, four registers, six patches
    mean = torch.stack([tokens[:, i] for i in range(5, 11)]).sum(0) / 6
    torch.testing.assert_close(pool_tokens(tokens, "patch", prefix=5), mean)
    torch.testing.assert_close(pool_tokens(tokens, "concat", prefix=5), torch.cat([tokens[:, 0], mean], 1))
    dense = pool_tokens(tokens, "patch_mode", prefix=5)
    assert dense.shape == (2, 6, 10)
    torch.testing.assert_close(dense[1, 3], torch.cat([tokens[1, 0], tokens[1, 8]]))


def test_image_pooling_without_cls():
    with pytest.raises(ValueError, match="CLS"):
        pool_tokens(torch.randn(1, 4, 3), "concat", prefix=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_pooling_ignores_padding(side):
    words = [torch.randn(n, 4) for n in (2, 5, 3)]
    tokens, mask = torch.full((3, 6, 4), 99.0), torch.zeros(3, 6, dtype=torch.int64)
    for row, real in enumerate(words):
        where = slice(6 - len(real), 6) if side == "left" else slice(0, len(real))
        tokens[row, where], mask[row, where] = real, 1
    torch.testing.assert_close(pool_text_tokens(tokens, mask, "mean"), torch.stack([w.mean(0) for w in words]))
    torch.testing.assert_close(pool_text_tokens(tokens, mask, "last"), torch.stack([w[-1] for w in words]))


@pytest.mark.parametrize("shape", [(400, 300), (300, 401), (224, 224), (180, 90), (90, 77)])
@pytest.mark.parametrize(
    "processor",
    [
        BitImageProcessorPil(  # DINOv2's values
            size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        CLIPImageProcessorPil(),
        ViTImageProcessorPil(size={"height": 96, "width": 80}),
    ],
    ids=["dinov2", "clip", "squash"],
)  # fmt: skip
def test_preprocess_equals_image_processor(processor, shape):
    ours = from_processor_config(processor.to_dict())
    image = _photo(*shape)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_siglip_224.webli"]
)
def test_preprocess_equals_timm(name):
    config = timm.get_pretrained_cfg(name).to_dict()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(config), is_training=False)
    image = _photo(400, 300)
    torch.testing.assert_close(from_timm_config(config)(image), transform(image), rtol=1e-5, atol=1e-5)


def test_preprocess_overrides_and_modes():
    values = from_processor_config(None)
    assert (values.size, values.shortest) == ((224, 224), 256)
    assert values.resized(448, None).shortest == 512
    whole = values.resized(160, 1.0)
    assert (whole.size, whole.shortest) == ((160, 160), 160)
    with pytest.raises(ValueError, match="crop_fraction"):
        values.resized(None, 1.2)
    copy = pickle.loads(pickle.dumps(whole))
    for mode in ("L", "RGBA", "P"):
        assert copy(_photo(200, 160).convert(mode)).shape == (3, 160, 160)


@pytest.mark.parametrize("interpolation", ["BICUBIC", "BILINEAR", "LANCZOS"])
@pytest.mark.parametrize("shape", [(400, 20), (33, 700), (300, 290)])
def test_a_banner_gives_the_centre_of_the_whole_resized_image(monkeypatch, shape, interpolation):
    values = ImagePreprocess((96, 80), 110, interpolation, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    whole = values(_photo(*shape))
    monkeypatch.setattr("models.encoders.preprocess.LONGEST", 0)
    assert (values(_photo(*shape)) - whole).abs().max() < 2.5 / 255


@pytest.mark.parametrize("shape", [(60_000, 1), (1, 60_000)])
def test_a_banner_is_never_resized_whole(monkeypatch, shape):
    sizes, resize = [], Image.Image.resize

    def recorded(image, size, *rest, **box):
        sizes.append(size)
        return resize(image, size, *rest, **box)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    assert ImagePreprocess((224, 224), 224)(Image.new("RGB", shape, (255, 0, 0))).shape == (3, 224, 224)
    assert sizes == [(224, 224)]
