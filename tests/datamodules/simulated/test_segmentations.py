"""Simulated scenes in Pascal VOC's layout, read by its ordinary reader."""

from __future__ import annotations

import numpy as np
from PIL import Image

from datamodules.readers.voc import VOID, VocSegmentation
from datamodules.simulated.scenes import CLASS_NAMES, make_scene, render
from datamodules.simulated.segmentations import START, outlines, write_scene_segmentations


def test_the_reader_gives_the_scenes_back(tmp_path):
    folder = write_scene_segmentations(str(tmp_path), images=6, image_size=64, seed=3)
    assert write_scene_segmentations(str(tmp_path), images=6, image_size=64, seed=3) == folder
    data = VocSegmentation(folder)
    assert len(data) == 6 and data.class_names == ["background", *CLASS_NAMES]
    for index in range(6):
        scene = make_scene(3, START + index)
        image, labels = data[index]
        assert image.size == (64, 64)
        assert np.array_equal(labels, outlines(scene, 64))
        drawn = {data.class_names[label] for label in np.unique(labels) if label not in (0, VOID)}
        assert drawn == {thing.name for thing in scene.things}


def test_outlines_lie_where_the_picture_differs_from_its_ground():
    """A thing's pixels have its colour: the picture without things differs there, and nowhere else."""
    for index in range(8):
        scene = make_scene(0, START + index)
        labels = outlines(scene, 96)
        bare = np.asarray(render(scene._replace(things=()), 96))
        changed = (np.asarray(render(scene, 96)) != bare).any(axis=2)
        inside = (labels != 0) & (labels != VOID)
        assert not changed[labels == 0].any()
        assert changed[inside].mean() > 0.99  # a thing may have the very colour of its ground somewhere
        assert 0.02 < inside.mean() < 0.5
        border = (labels == VOID).mean()
        assert 0 < border < 0.1
        assert Image.fromarray(labels).mode == "L"
