"""Imports what every run needs, for processes that are forked from one that has done it."""

import gc
import importlib

WARM = (
    "hydra.main", "matplotlib.pyplot", "pytorch_lightning", "scipy.optimize", "sklearn.base", "timm", "torchvision",
    "transformers", "experiments.runner",
)  # fmt: skip

for name in WARM:
    importlib.import_module(name)
gc.freeze()  # the collectors of the forked processes leave the shared pages alone
