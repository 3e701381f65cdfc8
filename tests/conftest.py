"""Options and settings shared by all tests."""

import os

import pytest
import torch

# Tests see what a machine without network sees, and say so at once instead of after a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# `make test` runs two workers: each, and what it starts, takes one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", dest="golden_dir", help="directory of <family>/*.safetensors to check against")
    parser.addoption("--family", help="only this family of the golden files")
