"""Load one tower of a Hugging Face checkpoint, whole: no weight of it may be left at its random start."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from models.errors import UserError
from models.io import CheckpointError, stable_hash


def load_transformer(
    path: Path,
    tower: Literal["vision_model", "text_model"],
    dtype: torch.dtype,
    with_pooler: bool,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The pretrained network in the folder `path`; of a checkpoint with two towers (CLIP, SigLIP), the one named.

    `with_pooler` says whether the model's own pooling head is used: sentence encoders often come without its weights.
    Raises CheckpointError if the folder is no checkpoint or lacks weights of the network, and UserError if it brings
    its own code and `trust_remote_code` is not set.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no config.json; give the folder of a Hugging Face checkpoint.")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        if config.model_type == "vit_mae":
            raise UserError(f"{path}: this model masks its input at random; use the timm weights of MAE instead.")
        logging.disable_progress_bar()
        network, report = AutoModel.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise CheckpointError(f"{path} cannot be loaded: {error}") from error
        raise UserError(
            f"{path} brings its own Python code, which is run only if you trust it: read the *.py files there, then set "
            "trust_remote_code=true for this encoder."
        ) from error
    except Exception as error:  # transformers raises many kinds for a broken or malicious file
        if isinstance(error, UserError):
            raise
        raise CheckpointError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        logging.enable_progress_bar()
    missing = sorted(k for k in report["missing_keys"] if with_pooler or not k.startswith("pooler."))
    missing += sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} weights of {type(network).__name__}: {', '.join(missing[:3])}, …")
    network = getattr(network, tower, network)
    if not with_pooler and isinstance(getattr(network, "pooler", None), nn.Module):
        network.pooler = None  # unused, and its weights may be random: they must not enter the identity
    return network


# Of a configuration: what says where the checkpoint lies, who wrote it and what it is asked to return, not what it computes.
_NOT_THE_NETWORK = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"}
_NOT_THE_NETWORK |= {"output_hidden_states", "output_attentions", "return_dict", "use_cache"}


def network_identity(network: nn.Module, code: Path | None = None) -> str:
    """Hash of the configuration, which decides with the weights what a network computes, and of the Python files in the
    folder ``code`` where the checkpoint brings its own.
    """
    config = {key: value for key, value in network.config.to_dict().items() if key not in _NOT_THE_NETWORK}
    files = sorted(code.glob("*.py")) if code else []
    return stable_hash([config, [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]])
