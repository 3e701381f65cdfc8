"""Who may import whom. Lazy imports inside functions count too; the standard library is free."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH = {"torch", "torchvision", "timm", "transformers", "safetensors", "numpy", "scipy", "PIL", "lion_pytorch"}
TORCH |= {"huggingface_hub"}  # the cache and download half of transformers
TORCH |= {"torchmetrics"}  # its functions
DECODERS = {"av", "soundfile", "webdataset", "pytorch_lightning", "pyarrow", "pydicom", "sksurv", "yaml"}
TORCH |= {"triton"}  # comes with torch where it builds for GPUs
PACKAGES = {  # package -> what it may import besides itself and the standard library
    "models": TORCH,
    "datamodules": TORCH | DECODERS | {"models"},
    "lightning_modules": TORCH | {"models", "pytorch_lightning", "torchmetrics"},
}
CONFIGURATION = {"hydra", "omegaconf"}  # run.py and experiments alone
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in PACKAGES}


def imported_roots(path: Path) -> dict[str, int]:
    """Top-level names a file imports, with the line of each."""
    roots = {}
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by full name, not relatively"
            names = [node.module]
        else:
            continue
        roots |= {name.split(".")[0]: node.lineno for name in names}
    return roots


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package):
    allowed = PACKAGES[package] | {package} | sys.stdlib_module_names
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {root}"
        for path in FILES[package]
        for root, line in imported_roots(path).items()
        if root not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_wandb_stays_in_one_file():
    files = [path for path in (ROOT / "experiments").rglob("*.py") if "wandb" in imported_roots(path)]
    assert len(files) <= 1, files


def test_the_rule_sees_what_it_forbids(tmp_path):
    (tmp_path / "x.py").write_text("import torch.nn\ndef f():\n    from hydra.utils import instantiate\n")
    roots = imported_roots(tmp_path / "x.py")
    assert roots == {"torch": 1, "hydra": 3}
    assert not CONFIGURATION & set().union(*PACKAGES.values())
    assert all("experiments" not in allowed for allowed in PACKAGES.values())
