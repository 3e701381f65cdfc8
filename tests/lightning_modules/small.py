"""Every Lightning module at the smallest size that trains, and rows of data for each."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.base import BaseDataModule
from datamodules.driving import Calibrations
from datamodules.simulated.driving.camera import make_camera
from datamodules.simulated.driving.ultrasound import make_rig
from lightning_modules.alignment import AlignmentModule
from lightning_modules.all_in_one import AllInOneModule
from lightning_modules.arl import ARLModule
from lightning_modules.avgn import AVGNModule
from lightning_modules.base import BaseModule
from lightning_modules.bev_fusion import BevFusionModule
from lightning_modules.csa import CSAModule
from lightning_modules.hammer import TERMS, HammerModule
from lightning_modules.llava_manager import LlavaManagerModule
from lightning_modules.mm_lego import MMLegoModule
from lightning_modules.rad_dino import RadDinoModule, by_view
from lightning_modules.rad_dino_baselines import SupervisedRadiographs
from lightning_modules.two_tower import TwoTowerModule
from models import batch as keys
from models.alignment.batch import IMAGE_FEATURES, TEXT_FEATURES
from models.alignment.head import AlignmentHead
from models.alignment.projectors import CentredProjector, LinearProjector
from models.all_in_one.batch import FALSE_ROWS
from models.all_in_one.model import AllInOne
from models.arl.batch import IMAGE_ENTITIES, TEXT_ENTITIES, entity_keys
from models.arl.graph import NO_ENTITY, Graph
from models.arl.model import ARL
from models.bev_fusion.batch import BEV_LABEL, CALIBRATIONS, CELSIUS, TRACES, VIEW_GRID, VIEW_VALID
from models.bev_fusion.losses import OccupancyLoss
from models.bev_fusion.network import BEVFusion, image_backbone
from models.losses.contrastive import InfoNCELoss
from models.losses.structure import StructureRegulariser
from models.mm_lego.batch import BIN, CENSORED, PRESENT, TARGETS, TIME, modality_key
from models.mm_lego.block import LegoBlock
from models.mm_lego.encoders import SNN
from models.mm_lego.fuse import LegoFuse
from models.mm_lego.merge import LegoMerge
from models.mm_lego.networks import OneModality
from models.rad_dino.backbone import DinoViT
from models.rad_dino.batch import FINDINGS, GLOBAL_CROPS, LOCAL_CROPS, MASK_INDICES, MASK_WEIGHTS, MASKS
from models.rad_dino.head import DinoHead
from models.rad_dino.masking import described
from models.rad_dino.model import StudentAndTeacher
from models.two_tower.batch import (
    ANSWER_SCORES,
    MEDIUM,
    QUERY_PLACES,
    QUESTION_IDS,
    QUESTION_MASK,
    SECOND_IMAGE,
    SIZES,
    SPANS,
    TILE_COUNTS,
    TILES,
    TOKEN_LABELS,
    TURNS,
)
from models.two_tower.llava import managed_llava
from models.two_tower.managers import Managers
from models.two_tower.model import TwoTower
from tests.models.arl.stand_in import SIZES as ARL_SIZES
from tests.models.avgn.conftest import small_network
from tests.models.hammer.stand_in import small_batch, small_hammer
from tests.models.two_tower.stand_in import SIZES as TWO_TOWER_SIZES
from tests.models.two_tower.stand_in import small_images, small_texts

SGD = partial(torch.optim.SGD, lr=0.01)
TWO_TOWER = {name: value for name, value in TWO_TOWER_SIZES.items() if name not in ("answers", "vocab_size")}
GRID = {"rows": 16, "cols": 16, "cell": 0.25, "x_bumper": -0.95}


class Small(NamedTuple):
    """A module and its data.

    Args:
        build: makes the module, always with the same weights.
        rows: number of samples to a batch of all of them.
        together: held-out batches are those of all devices together.
    """

    build: Callable[[], BaseModule]
    rows: Callable[[int], dict[str, Any]]
    together: bool = False


# ---- projector alignment -----------------------------------------------------------------------------------------------


def _alignment() -> AlignmentModule:
    head = partial(AlignmentHead, embed_dim=4, projector=LinearProjector, logit_bias_init=0.0)
    regulariser = StructureRegulariser(levels=2, warmup_steps=0)
    return AlignmentModule(head, InfoNCELoss(), SGD, regulariser=regulariser, vision_dim=6, text_dim=5)


def _csa() -> CSAModule:
    head = partial(AlignmentHead, embed_dim=4, projector=CentredProjector, norm=False, learn_scale=False)
    regulariser = StructureRegulariser(levels=2, warmup_steps=0)
    module = CSAModule(head, InfoNCELoss(), SGD, regulariser, vision_dim=6, text_dim=5)
    generator = torch.Generator().manual_seed(0)
    for projector, width in ((module.head.vision_projector, 6), (module.head.text_projector, 5)):
        projector.set_map(torch.zeros(width), torch.randn(width, 4, generator=generator))
    return module


def _features(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, 6, generator=generator)
    text = image[:, :5] + 0.5 * torch.randn(count, 5, generator=generator)
    return {keys.INDEX: torch.arange(count), IMAGE_FEATURES: image, TEXT_FEATURES: text}


# ---- All-in-One --------------------------------------------------------------------------------------------------------


def _all_in_one() -> AllInOneModule:
    model = partial(
        AllInOne, width=32, depth=2, heads=2, patch_size=8, image_size=16, text_length=8, frames=3, init_std=0.2, embed_dim=8,
        train_order="seeded",
    )  # fmt: skip
    return AllInOneModule(model, ("match", "mlm", "contrastive", "rank", "answer"), SGD, vocab_size=40, num_answers=6)


def _clips(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (count, 8), generator=generator)
    options = torch.randint(5, 40, (count, 3, 8), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    answers = torch.arange(count) % 6
    answers[-1] = -100
    return {
        keys.INDEX: torch.arange(count),
        keys.VIDEO: torch.randn(count, 3, 3, 16, 16, generator=generator),
        keys.TOKEN_IDS: ids,
        keys.TOKEN_MASK: torch.ones_like(ids),
        keys.MASKED_IDS: ids,
        keys.MASKED_LABELS: labels,
        keys.CANDIDATE_IDS: options,
        keys.CANDIDATE_MASK: torch.ones_like(options),
        keys.ANSWER: torch.where(answers < 3, answers, -100),
        keys.MATCHED: torch.ones(count, dtype=torch.int64),
    }


# ---- AVGN --------------------------------------------------------------------------------------------------------------


def _avgn() -> AVGNModule:
    return AVGNModule(small_network, SGD, num_classes=5, snippets=6)


def _videos(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.full((count, 3), -1)
    labels[:, 0] = torch.randint(0, 5, (count,), generator=generator)
    return {
        keys.INDEX: torch.arange(count),
        keys.VIDEO: torch.randint(0, 256, (count, 6, 3, 32, 32), generator=generator, dtype=torch.uint8),
        keys.AUDIO: torch.rand(count, 6, 1280, generator=generator) - 0.5,
        keys.AUDIO_VALID: torch.arange(count) % 3 > 0,
        keys.LABEL: labels[:, 0],
        keys.LABELS: labels,
    }


# ---- bird's-eye view ---------------------------------------------------------------------------------------------------


def _bev_fusion() -> BevFusionModule:
    torch.manual_seed(0)
    backbone = partial(image_backbone, name="test_resnet", pretrained=False)
    model = partial(BEVFusion, backbone, backbone, channels=8, camera_stride=4)
    return BevFusionModule(model, OccupancyLoss(), SGD, num_classes=2, heights=1, grid=GRID)


def _recordings(count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    rig, camera = make_rig(), make_camera(64, 48)
    return {
        keys.INDEX: torch.arange(count),
        keys.IMAGE: torch.rand(count, 3, 48, 64, generator=generator),
        VIEW_GRID: torch.rand(count, 1, 8, 8, 2, generator=generator) * 2 - 1,
        VIEW_VALID: torch.ones(count, 1, 8, 8, dtype=torch.bool),
        TRACES: torch.rand(count, len(rig.pairs), 128, generator=generator),
        CELSIUS: torch.full((count,), 15.0),
        CALIBRATIONS: Calibrations([camera] * count, [rig] * count),
        BEV_LABEL: torch.randint(0, 2, (count, 16, 16), generator=generator),
    }


# ---- HAMMER ------------------------------------------------------------------------------------------------------------


def _hammer() -> HammerModule:
    return HammerModule(partial(small_hammer, queue_size=24), SGD, loss_weights=dict.fromkeys(TERMS, 1.0))


# ---- MM-Lego -----------------------------------------------------------------------------------------------------------


PATIENTS = {"table": (1, 5), "patches": (6, 4)}


def _mm_lego(model: Callable, task: Any, modalities: tuple[str, ...], **options: Any) -> MMLegoModule:
    block = partial(LegoBlock, latent_tokens=5, latent_dim=8, heads=2, dim_head=4)
    data = {"shapes": {name: PATIENTS[name] for name in modalities}, "task": task, "num_classes": 3}
    encoders = {"table": partial(SNN, widths=(8, 8), dropout=0.0)}
    data |= {"bin_edges": (0.0, 4.0, 8.0, 20.0), "class_counts": (3, 4, 2)} | options
    return MMLegoModule(model, block, encoders, SGD, **data)


def _patients(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    times = torch.rand(count, generator=generator) * 15 + 1
    present = torch.ones(count, len(PATIENTS), dtype=torch.bool)
    present[::3, 1] = False
    return {
        keys.INDEX: torch.arange(count),
        **{modality_key(name): torch.randn(count, *shape, generator=generator) for name, shape in PATIENTS.items()},
        PRESENT: present,
        TIME: times,
        CENSORED: torch.arange(count) % 4 == 3,
        BIN: torch.bucketize(times, torch.tensor([4.0, 8.0])),
        keys.LABEL: torch.arange(count) % 3,
        TARGETS: (torch.rand(count, 3, generator=generator) < 0.5).float(),
    }


# ---- RAD-DINO ----------------------------------------------------------------------------------------------------------


def _rad_dino() -> RadDinoModule:
    backbone = partial(DinoViT, image_size=16, patch_size=8, dim=16, depth=2, heads=2, init_values=0.5, drop_path=0.2)
    head = partial(DinoHead, prototypes=12, hidden=16, bottleneck=8)
    model = partial(StudentAndTeacher, backbone, head, ibot_head=partial(head, prototypes=10), centring="centering")
    return RadDinoModule(model, SGD, temperature_epochs=1, freeze_last_layer_epochs=0, momentum=0.9)


def _radiographs_with_labels(labels: str) -> SupervisedRadiographs:
    backbone = partial(DinoViT, image_size=16, patch_size=8, dim=16, depth=2, heads=2)
    return SupervisedRadiographs(backbone, SGD, labels=labels, num_findings=3)


def _radiographs(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {
        keys.INDEX: torch.arange(count),
        keys.IMAGE: torch.randn(count, 3, 16, 16, generator=generator),
        FINDINGS: torch.randint(0, 2, (count, 3), generator=generator),
        GLOBAL_CROPS: torch.randn(count, 2, 3, 16, 16, generator=generator),
        LOCAL_CROPS: torch.randn(count, 2, 3, 8, 8, generator=generator),
        MASKS: torch.rand(count, 2, 4, generator=generator) < 0.4,
    }
    return batch | _listed_masks(batch[MASKS])


def _listed_masks(masks: Tensor) -> dict[str, Tensor]:
    listed = described(by_view(masks))
    return {MASK_INDICES: listed.indices, MASK_WEIGHTS: listed.weights}


# ---- two towers --------------------------------------------------------------------------------------------------------


def _two_tower(tasks: tuple[str, ...], **options: Any) -> TwoTowerModule:
    model = partial(TwoTower, partial(Managers, text_experts=2, image_experts=2), **TWO_TOWER, image_types=2)
    return TwoTowerModule(model, tasks, SGD, vocab_size=40, padding_id=1, answers=5, **options)


def _llava_manager() -> LlavaManagerModule:
    model = partial(
        managed_llava, kind="adaptive_cross", vision_width=16, vision_layers=4, vision_heads=4, vision_intermediate=16,
        width=16, layers=2, heads=4, key_value_heads=2, intermediate=16, tied=False, every=1, init_std=0.1,
    )  # fmt: skip
    module = LlavaManagerModule(model, SGD, vocab_size=40, image_size=8, patch_size=4, grids=[[2, 2]])
    for manager in module.model.managers.manager:
        manager.jitter = 0.0  # ranks would draw others than one process
    return module


def _conversations(count: int) -> dict[str, Any]:
    """Whole images and tiles, a text alone in every fourth place; as many labels in each row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (count, 32), generator=generator)
    labels, turns = torch.full_like(ids, -100), torch.zeros_like(ids)
    labels[:, -4:], turns[:, -2:] = ids[:, -4:], 1
    seen = [row % 4 != 3 for row in range(count)]
    return {
        keys.INDEX: torch.arange(count),
        keys.TOKEN_IDS: ids,
        keys.TOKEN_MASK: torch.ones_like(ids),
        TOKEN_LABELS: labels,
        TURNS: turns,
        QUERY_PLACES: torch.tensor([[26, 27, -1 if row % 2 else 28] for row in range(count)]),
        TILES: torch.randn(5 * sum(seen), 3, 8, 8, generator=generator),
        TILE_COUNTS: [5 if image else 0 for image in seen],
        SIZES: [(16, 16) if image else (0, 0) for image in seen],
        SPANS: [(1, 24) if image else (0, 0) for image in seen],
    }


def _images_with_texts(count: int) -> dict[str, Tensor]:
    ids, mask = small_texts(tuple(3 + i % 5 for i in range(count)))
    answers = torch.arange(count) % 2
    labels = torch.full_like(ids, -100)
    labels[:, 1] = ids[:, 1]
    return {
        keys.INDEX: torch.arange(count),
        keys.IMAGE: small_images(count),
        SECOND_IMAGE: small_images(count, seed=1),
        keys.TOKEN_IDS: ids,
        keys.TOKEN_MASK: mask,
        keys.MASKED_IDS: ids,
        keys.MASKED_LABELS: labels,
        MEDIUM: torch.arange(count) // 2,
        QUESTION_IDS: ids.flip(0),
        QUESTION_MASK: mask.flip(0),
        keys.CANDIDATE_IDS: torch.stack([ids.roll(i, 0) for i in range(3)], dim=1),
        keys.CANDIDATE_MASK: torch.stack([mask.roll(i, 0) for i in range(3)], dim=1),
        keys.ANSWER: answers,
        ANSWER_SCORES: torch.eye(5)[answers],
        keys.MATCHED: torch.ones(count, dtype=torch.int64),
    }


# ---- ARL ---------------------------------------------------------------------------------------------------------------


def _arl(tasks: tuple[str, ...], graph: Graph | None = None, sizes: dict[str, Any] | None = None, **options: Any) -> ARLModule:
    graph = graph or Graph([f"entity {i}" for i in range(9)], torch.tensor([[0, 1], [1, 2], [5, 3], [3, 3]]))
    model = partial(ARL, **{**ARL_SIZES, **(sizes or {})})
    of_data = {"vocab_size": 40, "padding_id": 1, "answers": 5}
    return ARLModule(model, tasks, SGD, graph=graph, **of_data, **{"mim_levels": 2, **options})


def _images_with_entities(count: int) -> dict[str, Tensor]:
    batch = _images_with_texts(count)
    ids = torch.arange(3 * count).view(count, 3) % 9
    ids[0], ids[1:, 2] = NO_ENTITY, NO_ENTITY
    cover = torch.zeros(count, 3, batch[keys.TOKEN_IDS].shape[1])
    for place in range(2):
        cover[1:, place, 1 + place : 3 + place] = 1
    for name in ("caption", "masked", "question"):
        batch |= dict(zip(entity_keys(name), (ids, cover), strict=True))
    batch |= dict(zip(entity_keys("candidates"), (torch.stack([ids] * 3, 1), torch.stack([cover] * 3, 1)), strict=True))
    return batch | {TEXT_ENTITIES: ids, IMAGE_ENTITIES: ids}


MODULES = {
    "alignment": Small(_alignment, _features, together=True),
    "csa": Small(_csa, _features, together=True),
    "all_in_one": Small(_all_in_one, _clips),
    "arl": Small(partial(_arl, ("mlm", "mim", "match", "align", "rank")), _images_with_entities),
    "avgn": Small(_avgn, _videos),
    "bev_fusion": Small(_bev_fusion, _recordings),
    "hammer": Small(_hammer, small_batch),
    "mm_lego": Small(partial(_mm_lego, LegoMerge, "survival", tuple(PATIENTS), class_weights="inverse"), _patients),
    "mm_lego_block": Small(partial(_mm_lego, OneModality, "classification", ("patches",), l1=1e-3), _patients),
    "mm_lego_weave": Small(partial(_mm_lego, partial(LegoFuse, method="weave"), "multi_label", tuple(PATIENTS)), _patients),
    "rad_dino": Small(_rad_dino, _radiographs),
    "radiograph_findings": Small(partial(_radiographs_with_labels, "findings"), _radiographs),
    "two_tower": Small(
        partial(_two_tower, ("mlm", "match", "rank", "answer", "reason"), negatives="given"), _images_with_texts
    ),
    "two_tower_hard": Small(partial(_two_tower, ("contrastive", "match", "entail")), _images_with_texts),
    "llava_manager": Small(_llava_manager, _conversations),
    "two_tower_texts": Small(partial(_two_tower, ("contrastive", "mlm")), _images_with_texts),
}


def built(name: str) -> BaseModule:
    torch.manual_seed(0)
    return MODULES[name].build()


def some_rows(batch: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """These ``rows`` of a batch."""
    out = {}
    for key, value in batch.items():
        if key in (MASK_INDICES, MASK_WEIGHTS):  # of the whole batch
            continue
        if isinstance(value, Calibrations):
            out[key] = Calibrations([value.cameras[row] for row in rows], [value.rigs[row] for row in rows])
        elif key == TILES:
            tiles = value.split(batch[TILE_COUNTS])
            out[key] = torch.cat([tiles[row] for row in rows])
        elif isinstance(value, list):
            out[key] = [value[row] for row in rows]
        else:
            out[key] = value[torch.from_numpy(rows)]
    if keys.AUDIO_VALID in out:
        out[keys.SILENT] = not bool(out[keys.AUDIO_VALID].any())
    if keys.MATCHED in out:  # the clip of the next row stands in for the second half
        count = len(rows)
        out[keys.MATCHED] = (torch.arange(count) < count // 2).long()
        out[FALSE_ROWS] = (torch.arange(count // 2, count) + 1) % count
    if MASKS in out:
        out |= _listed_masks(out[MASKS])
    return out


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch: dict[str, Any]):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch[keys.INDEX])

    def __getitem__(self, request) -> dict[str, Any]:
        return some_rows(self.batch, request.rows)


class Data(BaseDataModule):
    """``train`` and ``val`` of a module, in memory."""

    def __init__(self, name: str, batch_size: int, train: int, val: int):
        super().__init__(num_workers=0)
        small = MODULES[name]
        self.batch_size, self.together = batch_size, small.together
        self.splits = {"train": Rows(small.rows(train)), "val": Rows(small.rows(val))}

    def train_dataloader(self):
        return self.train_loader(self.splits["train"], self.batch_size)

    def evaluation_dataloader(self, split: str):
        size = self.batch_size * (self._world_size() if self.together else 1)
        return self.evaluation_loader(self.splits[split], size)


def trainer(**options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", use_distributed_sampler=False, **quiet, **options)


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Variables of a process that torchrun would have started on this machine."""
    return {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(world_size), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
