"""Held-out loss and retrieval of two real processes over gloo are those of one process with the whole batch."""

import os
import socket
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp

from datamodules.base import BaseDataModule
from lightning_modules.alignment import AlignmentModule
from models.alignment.batch import IMAGE_FEATURES, TEXT_FEATURES
from models.alignment.head import AlignmentHead
from models.alignment.projectors import LinearProjector
from models.batch import INDEX
from models.losses.contrastive import InfoNCELoss
from models.losses.structure import StructureRegulariser

RANKS, BATCH, HELD_OUT = 2, 4, 21  # whole batches of 8, 8 and 5: one rank has 3 of these and the other 2 and a repeat


class Rows(torch.utils.data.Dataset):
    """Paired features; those of a batch are its rows of two fixed matrices."""

    def __init__(self, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.image = torch.randn(count, 6, generator=generator)
        self.text = self.image[:, :5] + 0.5 * torch.randn(count, 5, generator=generator)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, request) -> dict:
        rows = torch.from_numpy(request.rows)
        return {INDEX: rows, IMAGE_FEATURES: self.image[rows], TEXT_FEATURES: self.text[rows]}


class Data(BaseDataModule):
    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size, self.splits = batch_size, {"train": Rows(16, 0), "val": Rows(HELD_OUT, 1)}

    def evaluation_dataloader(self, split: str):
        return self.evaluation_loader(self.splits[split], self.batch_size * self._world_size())


def _validate(batch_size: int, **trainer) -> dict[str, float]:
    torch.manual_seed(0)
    module = AlignmentModule(
        head=partial(AlignmentHead, embed_dim=4, projector=LinearProjector, logit_bias_init=0.0),
        loss=InfoNCELoss(),
        regulariser=StructureRegulariser(levels=2),
        vision_dim=6,
        text_dim=5,
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    fitter = pl.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **trainer)
    fitter.validate(module, datamodule=Data(batch_size), verbose=False)
    return {name: float(value) for name, value in fitter.callback_metrics.items()}


def _rank(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(RANKS), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    queue.put((rank, _validate(BATCH, devices=RANKS, strategy="ddp")))


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[str, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (port, queue), nprocs=RANKS)
    found = dict(queue.get() for _ in range(RANKS))
    return [found[rank] for rank in range(RANKS)]


def test_two_ranks_judge_as_one_process(of_ranks):
    alone = _validate(RANKS * BATCH, devices=1)
    assert {"val/loss", "val/loss/contrastive", "val/loss/structure", "val/retrieval/mean_recall"} <= alone.keys()
    for found in of_ranks:
        assert found == pytest.approx(alone, rel=1e-5)
    # Another size of the batch is another loss: the comparison can fail.
    assert _validate(BATCH, devices=1)["val/loss"] != pytest.approx(alone["val/loss"], rel=1e-2)
