import pytest
import torch

from models.optim.ema import ema_update_


def test_in_place_average_of_every_tensor():
    averages, values = [torch.ones(3), torch.zeros(2, 2)], [torch.zeros(3), torch.full((2, 2), 4.0)]
    places = [average.data_ptr() for average in averages]
    ema_update_(iter(averages), iter(values), 0.75)
    assert averages[0].tolist() == [0.75] * 3 and averages[1].flatten().tolist() == [1.0] * 4
    assert [average.data_ptr() for average in averages] == places


def test_unequal_lists():
    with pytest.raises(ValueError, match="2 averages of 1"):
        ema_update_([torch.ones(1)] * 2, [torch.ones(1)], 0.5)
