import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.transforms.image_box import CLIP_MEAN, CLIP_STD, box_target, image_tensor


def test_a_flip_moves_box_and_pixels_together():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[5:15, 4:12] = 255
    picture = Image.fromarray(pixels)
    for flip in (False, True):
        image, box = image_tensor(picture, 40, flip), box_target([4, 5, 12, 15], picture.size, flip)
        bright = (image[0] > (0.5 - CLIP_MEAN[0]) / CLIP_STD[0]).nonzero().float()
        centre = (bright.mean(dim=0) + 0.5) / 40
        assert centre.tolist() == pytest.approx([box[1], box[0]], abs=0.01)
    assert box.tolist() == pytest.approx([32 / 40, 0.5, 8 / 40, 0.5])


def test_fractions_are_cut_and_no_box_is_zeros():
    assert box_target([3.7, 0.7, 5.9, 2.8], (10, 10)).tolist() == pytest.approx([0.4, 0.1, 0.2, 0.2])
    assert box_target([], (10, 10)).tolist() == [0, 0, 0, 0]


def test_augmentation_sees_the_resized_pixels():
    seen = []
    image_tensor(Image.new("RGB", (30, 20)), 8, augment=lambda pixels: seen.append(pixels.shape) or pixels)
    assert seen == [(8, 8, 3)]
    white = image_tensor(Image.new("RGB", (30, 20), "white"), 8)
    torch.testing.assert_close(white[:, 0, 0], (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD))
