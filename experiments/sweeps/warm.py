"""Imports what every run needs, for processes that are forked from one that has done it."""

import gc

import matplotlib.pyplot  # noqa: F401
import pytorch_lightning  # noqa: F401
import scipy.optimize  # noqa: F401
import timm  # noqa: F401
import torchvision  # noqa: F401
import transformers  # noqa: F401

import experiments.runner  # noqa: F401

gc.freeze()  # the collectors of the forked processes leave the shared pages alone
