"""Front door: ``python run.py experiment=<name> [key=value ...]``; ``--help`` and ``make list`` say what there is.

Thin on purpose: set what must be set before torch is imported, let Hydra compose, check the configuration from source
alone, then hand over to :mod:`experiments.runner`.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

# Hydra looks for `hydra_plugins` on sys.path, and DataLoader workers import the project by name, from any directory.
ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments" / "plugins")]

from experiments.config import validation  # noqa: E402
from experiments.config.explanation import explain  # noqa: E402
from experiments.config.overrides import creating  # noqa: E402
from experiments.config.resolvers import register_resolvers  # noqa: E402


def keep_freed_memory() -> None:
    """Tell glibc to recycle large blocks instead of mapping fresh pages for each: 2-3x on memory-bound CPU code."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # not glibc: the allocator keeps its defaults


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    validation.check(cfg)
    first = "experiments.runner" not in sys.modules  # in a sweep; later a freeze would keep what earlier jobs have left
    if first:
        gc.disable()  # a quarter of the time that the imports take would go into looking for garbage that is not there
    from experiments.runner import run  # torch is imported here, after the configuration is known to be sound

    if first:
        gc.freeze()  # nor is it looked for in the imported modules later
        gc.enable()
    return run(cfg)


if __name__ == "__main__":
    keep_freed_memory()
    # Lets exceptions reach us unprinted, so that the user's mistakes are explained and real bugs keep their traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Webdataset then refuses `pipe:` commands and pickles found inside shards; transformers must not phone home.
    os.environ.setdefault("WDS_SECURE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads of torch that wait for one another then sleep. By default they spin, which takes the core from the thread they
    # wait for wherever the cores are busy (`make bench ONLY=threads`).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    register_resolvers()
    sys.argv[1:] = creating(sys.argv[1:])
    try:
        main()
    except BaseException as error:  # explained, with its exit code
        sys.exit(explain(error))
