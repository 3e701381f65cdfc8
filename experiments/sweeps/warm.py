"""Imports what every run needs, for processes that are forked from one that has done it."""

import gc
import importlib

WARM = ("matplotlib.pyplot", "pytorch_lightning", "scipy.optimize", "timm", "torchvision", "transformers", "experiments.runner")

for name in WARM:
    importlib.import_module(name)
gc.freeze()  # the collectors of the forked processes leave the shared pages alone
