"""OmegaConf resolvers that the configuration files may use."""

import os

from omegaconf import OmegaConf


def register_resolvers() -> None:
    """Register them.

    ``${cpu_workers:4}``: at most that many DataLoader workers, fewer on a small machine (none on one core).
    ``${either:${a},b}``: ``a``, or ``b`` where ``a`` is null.
    """
    OmegaConf.register_new_resolver("cpu_workers", lambda most: min(int(most), (os.cpu_count() or 1) - 1), replace=True)
    OmegaConf.register_new_resolver("either", lambda value, other: other if value is None else value, replace=True)
