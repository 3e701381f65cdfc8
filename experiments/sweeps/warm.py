"""Imports what every run needs, for processes that are forked from one that has done it.

The forked process calls ``gc.freeze()`` and ``gc.enable()`` when it starts: its collector then leaves the shared pages alone.
"""

import gc
import importlib

WARM = ("matplotlib.pyplot", "scipy.optimize", "experiments.config.explanation", "experiments.runner", "run")

gc.disable()  # a quarter of the time that the imports take would go into looking for garbage that is not there
for name in WARM:
    importlib.import_module(name)
