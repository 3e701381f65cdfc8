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
        "datamodule=simulated_scenes",
        "encoder/vision=efficientnet_lite0",
        "encoder.vision.image_size=64",
        "encoder/text=minilm",
        "trainer.precision=32-true",
    ),
)
TINY_HAMMER = (
    "datamodule.simulate.train=130", "datamodule.simulate.val=16", "datamodule.simulate.test=40",
)  # fmt: skip
HAMMER = StandIns(
    TINY_HAMMER,
    (
        "datamodule=simulated_manipulations", "checkpoint=null", "trainer.devices=1", "module.model.width=24",
        "module.model.vision_layers=1", "module.model.text_layers=2", "module.model.fusion_layer=1",
        "module.model.text_intermediate=32", "module.model.embed_dim=8", "module.model.queue_size=96",
    ),
)  # fmt: skip
# The longest prefix of a recipe's name counts.
BY_PREFIX = {
    "sail": ALIGNMENT,
    "hammer": HAMMER,
}


def stand_ins_of(recipe: str) -> StandIns:
    """Of a recipe such as ``paper/sail_dinov2``. Raises KeyError for a recipe that nobody provided for."""
    name = recipe.removeprefix("paper/")
    prefix = max((p for p in BY_PREFIX if name.startswith(p)), key=len, default=None)
    if prefix is None:
        raise KeyError(f"tests/experiments/stand_ins.py says nothing about the recipe '{recipe}'")
    return BY_PREFIX[prefix]
