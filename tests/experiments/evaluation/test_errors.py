"""Tables of errors: what is worst stands first, and images lie beside the table."""

import numpy as np
import torch
from PIL import Image

from datamodules.readers.base import BadSample
from experiments.evaluation.errors import (
    WORST,
    confidence_of_wrong,
    missed,
    outlined,
    read_table,
    strip,
    worst,
    write_table,
    wrong_retrievals,
)


def test_the_largest_come_first_and_what_is_right_not_at_all():
    assert worst(torch.tensor([0.0, 2.0, 0.5, 2.0])) == [1, 3, 2]
    assert worst(torch.arange(100)) == list(range(99, 99 - WORST, -1))


def test_only_wrong_verdicts_are_errors():
    logits = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 1.0], [5.0, 0.0]])
    severity = confidence_of_wrong(logits, torch.tensor([0, 0, 0, -100]))
    assert worst(severity) == [1, 2]
    assert severity[1] == torch.softmax(logits[1], dim=0)[1]
    several = torch.tensor([[1, 0], [0, -1], [0, 1], [-1, -1]])
    assert worst(confidence_of_wrong(logits, several)) == [1]


def test_boxes_that_were_not_found():
    overlap = torch.tensor([0.4, 0.9, 0.0, 0.0])
    assert worst(missed(overlap, torch.tensor([True, True, True, False]))) == [2, 0]


def test_boxes_are_outlined_in_their_colours():
    image = np.asarray(outlined(Image.new("RGB", (40, 20)), {"#00ff00": (0.25, 0.5, 0.75, 0.9), "#ff0000": (0, 0, 0, 0)}))
    assert image[10, 20].tolist() == [0, 255, 0] and image[0, 0].tolist() == [255, 0, 0]
    assert image[14, 20].tolist() == [0, 0, 0] and image[4, 20].tolist() == [0, 0, 0]


def test_texts_whose_own_image_ranks_last(tmp_path):
    scores = torch.tensor([[3.0, 2.0, 1.0], [2.0, 1.0, 3.0], [3.0, 2.0, 1.0]])
    owner = torch.tensor([0, 1, 2])
    ranks = (scores > scores.gather(1, owner[:, None])).sum(dim=1)
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    rows = wrong_retrievals(
        ranks, owner, lambda text: int(scores[text].argmax()), "abc".__getitem__, lambda i: Image.new("RGB", (8, 8), colours[i])
    )
    columns, cells = read_table(write_table(tmp_path / "errors", "retrieval", rows))
    assert columns == ["text", "rank", "own", "retrieved"]
    assert [row[:2] for row in cells] == [["b", 3.0], ["c", 3.0]]
    pixels = [[np.asarray(Image.open(file))[0, 0].argmax() for file in row[2:]] for row in cells]
    assert pixels == [[1, 2], [2, 0]]


def test_a_text_with_commas_and_line_breaks_stays_one_cell(tmp_path):
    rows = [{"text": 'a "red", round\nthing', "rank": 2}]
    assert read_table(write_table(tmp_path / "errors", "texts", rows))[1] == [['a "red", round\nthing', 2.0]]


def test_an_image_that_can_no_longer_be_opened_leaves_its_cell_empty(tmp_path):
    def broken():
        raise BadSample("unreadable: a.jpg")

    assert read_table(write_table(tmp_path / "errors", "texts", [{"text": "a", "image": broken}]))[1] == [["a", ""]]


def test_frames_stand_side_by_side():
    frames = np.stack([np.zeros((4, 3, 3)), np.ones((4, 3, 3))])
    image = np.asarray(strip(frames))
    assert image.shape == (4, 6, 3) and image[:, :3].max() == 0 and image[:, 3:].min() == 255
