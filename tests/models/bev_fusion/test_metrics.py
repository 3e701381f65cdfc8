import numpy as np
from sklearn.metrics import confusion_matrix, jaccard_score, precision_recall_fscore_support

from models.bev_fusion.geometry import BevGrid
from models.bev_fusion.metrics import cell_scores, confusion, object_scores


def test_cells_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 3, (4, 20, 20)), rng.integers(0, 3, (4, 20, 20))
    label[rng.random(label.shape) < 0.1] = 255
    known = label != 255
    matrix = confusion(label, predicted, 3)
    np.testing.assert_array_equal(matrix, confusion_matrix(label[known], predicted[known]))
    scores = cell_scores(matrix)
    precision, recall, f1, _ = precision_recall_fscore_support(label[known], predicted[known])
    for name, value in (("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(scores[name], value)
    np.testing.assert_allclose(scores["iou"], jaccard_score(label[known], predicted[known], average=None))


def maps():
    label, predicted = np.zeros((1, 20, 20), int), np.zeros((1, 20, 20), int)
    label[0, 4:6, 10] = 1  # found one cell too far away
    predicted[0, 5:7, 10] = 1
    label[0, 15, 2] = 1  # missed
    predicted[0, 18, 18] = 1  # not there
    return label, predicted


def test_objects_by_hand():
    label, predicted = maps()
    found = object_scores(label, predicted, BevGrid(20, 20, 0.2, -1.0))
    assert (found.recall, found.precision) == (0.5, 0.5)
    near, far = np.hypot(0.9, 0.1), np.hypot(1.1, 0.1)
    np.testing.assert_allclose(found.euclidean, 0.2)
    np.testing.assert_allclose(found.absolute, far - near)
    np.testing.assert_allclose(found.normalized, (far - near) / near)
    assert found.table[1, 1:].tolist()[0] == 0 and (found.table[1, 3:] == -1).all()


def test_small_predictions_are_dropped_and_unknown_cells_ignored():
    label, predicted = maps()
    assert object_scores(label, predicted, BevGrid(20, 20, 0.2), min_cells=2).precision == 1
    label[0, 18, 18] = 255
    assert object_scores(label, predicted, BevGrid(20, 20, 0.2)).precision == 1


def test_nothing_there():
    empty = np.zeros((1, 8, 8), int)
    found = object_scores(empty, empty, BevGrid(8, 8, 0.2))
    assert (found.recall, found.precision, found.euclidean, len(found.table)) == (0, 0, 0, 0)
