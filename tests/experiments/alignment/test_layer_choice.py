"""Which pair of layers a recipe trains on: the extremes, the last, and draws from the fifths of all pairs by similarity."""

import numpy as np
import pytest
import torch

from experiments.alignment.layer_choice import ranked


class Stored:
    """Layers of 60 samples in the way stores are read: the later a layer of the images, the less it resembles the texts."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(60, 8, generator=generator)
        self.rows = np.arange(60)
        noise = [torch.randn(60, 8, generator=generator) for _ in range(7)]
        self.image_stores = {"layers": Layers([base + 0.3 * i * n for i, n in enumerate(noise[:5])])}
        self.text_stores = {"layers": Layers([base, base + 0.8 * noise[5], noise[6]])}

    def caption_rows(self, rows, pick):
        return rows


class Layers(list):
    @property
    def per_row(self):
        return len(self)

    def read(self, rows, layer):
        return self[layer][torch.from_numpy(rows)]


def test_extremes_and_last():
    chosen = ranked(Stored())
    assert (chosen["vision"], chosen["text"]) == (0, 0) and chosen == ranked(Stored(), "max")
    assert ranked(Stored(), "min")["text"] == 2
    assert [ranked(Stored(), "last")[side] for side in ("vision", "text")] == [4, 2]


@pytest.mark.parametrize("fifth", [1, 3, 5])
def test_a_fifth_holds_the_pairs_of_its_rank(fifth):
    ranks = set()
    for seed in range(30):
        chosen = ranked(Stored(), f"fifth{fifth}", seed=seed, samples=60)
        order = torch.tensor(chosen["scores"]).flatten().argsort(stable=True).tolist()
        ranks.add(order.index(3 * chosen["vision"] + chosen["text"]))
    assert ranks == set(range(3 * fifth - 3, 3 * fifth))
