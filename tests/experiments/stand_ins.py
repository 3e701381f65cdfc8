"""What makes a recipe runnable in seconds on a test machine, by the first words of its name. Everything else stays as it is.

``small`` shrinks data that is simulated; ``stand_ins`` replaces, for recipes under ``paper/``, the weights and data that a
test machine has not.
"""

from __future__ import annotations

from typing import NamedTuple


class StandIns(NamedTuple):
    small: tuple[str, ...]
    stand_ins: tuple[str, ...] = ()


# Two steps of everything, read in the main process.
TINY = ("debug=two_steps", "datamodule.num_workers=0")
SMALL_SCENES = ("datamodule.simulate.train=48", "datamodule.simulate.val=16", "datamodule.simulate.test=24")
ALIGNMENT = StandIns(
    SMALL_SCENES,
    (
        "datamodule=image_text/simulated",
        "encoder/vision=efficientnet_lite0",
        "encoder.vision.image_size=64",
        "encoder/text=minilm",
        "trainer.precision=32-true",
    ),
)
SMALL_CLIPS = ("datamodule.simulate.train=24", "datamodule.simulate.val=8", "datamodule.simulate.test=12")


def video_text(data: str, *more: str) -> StandIns:
    """A narrow model on simulated clips, from no checkpoint."""
    narrow = ("width=32", "depth=2", "heads=2", "image_size=32", "patch_size=8")
    return StandIns(
        SMALL_CLIPS,
        (
            f"datamodule={data}",
            "checkpoint=null",
            *(f"module.model.{setting}" for setting in narrow),
            "datamodule.batch_size=6",
            "trainer.accumulate_grad_batches=1",
            "trainer.precision=32-true",
            *more,
        ),
    )


PRETRAINING = ("module.backbone=null", "++datamodule.annotations.howto100m=null")
ALL_FRAMES = "datamodule.official_frames=false"  # twelve frames give no eight segments of two
TINY_HAMMER = (
    "datamodule.simulate.train=130", "datamodule.simulate.val=16", "datamodule.simulate.test=40",
)  # fmt: skip
HAMMER = StandIns(
    TINY_HAMMER,
    (
        "datamodule=dgm4/simulated", "checkpoint=null", "trainer.devices=1", "module.model.width=24",
        "module.model.vision_layers=1", "module.model.text_layers=2", "module.model.fusion_layer=1",
        "module.model.text_intermediate=32", "module.model.embed_dim=8", "module.model.queue_size=96",
    ),
)  # fmt: skip
BEV_FUSION = StandIns(
    ("datamodule.simulate.train=16", "datamodule.simulate.val=8", "datamodule.simulate.test=12", "datamodule.batch_size=4"),
    (
        "datamodule.grid={rows: 32, cols: 32, cell: 0.125, x_bumper: -0.95}", "datamodule.width=96", "datamodule.height=72",
        "module.model.camera_backbone.name=test_resnet", "module.model.camera_backbone.pretrained=false",
        "module.model.channels=16", "trainer.precision=32-true",
    ),
)  # fmt: skip
TINY_ENCODERS = (*ALIGNMENT.stand_ins, "encoder.vision.pooling=default", "encoder.text.max_length=64")
LAYERS = StandIns(
    SMALL_SCENES,
    (*TINY_ENCODERS, "+encoder.vision.layers=true", "encoder.text.layers=true", "module.head.embed_dim=16"),
)
AVGN = StandIns(
    SMALL_CLIPS,
    ("datamodule=audio_visual/simulated", "module=avgn/small", "datamodule.batch_size=6", "datamodule.eval_batch_size=6"),
)
FEW_OUTLINES = (*SMALL_SCENES, "++evaluation.localisation.limit=6")
# The longest prefix of a recipe's name counts.
BY_PREFIX = {
    "sail": ALIGNMENT,
    "all_in_one": video_text("simulated_clips"),
    "all_in_one_pretrain": video_text("simulated_pretraining", *PRETRAINING),
    "all_in_one_pretrain_ytt": video_text("simulated_pretraining", *PRETRAINING, "++datamodule.annotations.yttemporal=null"),
    "all_in_one_small_pretrain": video_text("simulated_pretraining", *PRETRAINING),
    "all_in_one_tiny_pretrain": video_text("simulated_pretraining", *PRETRAINING),
    "all_in_one_plus_pretrain": video_text("simulated_pretraining", *PRETRAINING),
    "all_in_one_plus_pretrain_8sets": video_text(
        "simulated_pretraining",
        *PRETRAINING,
        "++datamodule.annotations.yttemporal=null",
        *(f"++datamodule.images.{name}=null" for name in ("cc12m", "coco", "vg", "sbu")),
    ),
    **dict.fromkeys(
        ("all_in_one_msrvtt_vtc", "all_in_one_msrvtt_fused", "all_in_one_lsmdc", "all_in_one_msvd", "all_in_one_didemo"),
        video_text("simulated_captions", "datamodule.text_length=16"),
    ),
    "all_in_one_activitynet": video_text("simulated_captions"),
    "all_in_one_msvd_qa": video_text("simulated_clips"),
    "all_in_one_k400": video_text("simulated_clips", ALL_FRAMES),
    "all_in_one_pretrain_webvid": video_text("simulated_pretraining", *PRETRAINING, ALL_FRAMES),
    **dict.fromkeys(
        ("all_in_one_lsmdc_choice", "all_in_one_tgif_action", "all_in_one_tgif_transition", "all_in_one_tvqa"),
        video_text("simulated_choice"),
    ),
    "all_in_one_vcr": video_text("simulated_choice", "module.tasks=[choice]"),
    **dict.fromkeys(
        ("all_in_one_msrvtt_choice", "all_in_one_ego4d_choice"),
        video_text("simulated_choice", "stages=[prepare,fit,evaluate,report]"),
    ),
    "hammer": HAMMER,
    "bev_fusion": BEV_FUSION,
    "freeze_align": StandIns(FEW_OUTLINES, (*TINY_ENCODERS, "module.head.embed_dim=16")),
    # A side without a projector decides the width: MiniLM's.
    **dict.fromkeys(
        ("freeze_align_dinov2_siglip_text", "freeze_align_dinov2_slots"),
        StandIns(FEW_OUTLINES, (*TINY_ENCODERS, "module.head.embed_dim=384")),
    ),
    "structure": LAYERS,
    "structure_dinov2": StandIns((*SMALL_SCENES, "subset.pairs=32")),
    "structure_agreement": StandIns(("datamodule.train.pairs=300", "subset.pairs=32")),
    "assess": StandIns((*SMALL_SCENES, "assess.vision.lite0_224=null", "assess.vision.lite0_128.image_size=64")),
    "avgn": AVGN,
}


def stand_ins_of(recipe: str) -> StandIns:
    """Of a recipe such as ``paper/alignment/sail_dinov2``. Raises KeyError for a recipe that nobody provided for."""
    name = recipe.removeprefix("paper/")
    prefix = max((p for p in BY_PREFIX if name.startswith(p)), key=len, default=None)
    if prefix is None:
        raise KeyError(f"tests/experiments/stand_ins.py says nothing about the recipe '{recipe}'")
    return BY_PREFIX[prefix]
