"""Options and settings shared by all tests."""

import os

import pytest
import torch

# Tests see what a machine without network sees, and say so at once instead of after a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", dest="golden_dir", help="directory of <family>/*.safetensors to check against")
    parser.addoption("--family", help="only this family of the golden files")
