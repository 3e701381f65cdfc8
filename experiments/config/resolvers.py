"""OmegaConf resolvers that the configuration files may use."""

import os

from omegaconf import OmegaConf


def register_resolvers() -> None:
    """``${cpu_workers:4}``: at most that many DataLoader workers, fewer on a small machine (none on one core)."""
    OmegaConf.register_new_resolver("cpu_workers", lambda most: min(int(most), (os.cpu_count() or 1) - 1), replace=True)
