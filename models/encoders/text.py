"""Frozen text encoders from the Hugging Face hub."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.encoders.base import DTYPES, Dtype, Features, FrozenEncoder
from models.encoders.pooling import pool_text_tokens
from models.encoders.transformer import load_transformer, network_identity
from models.encoders.weights import find_weights
from models.io import stable_hash

OPTION = "encoder.text.weights"
Padding = Literal["longest", "max_length"]


class Tokenize:
    """A tokenizer with its limit on the length: texts to what the network takes. Picklable, so that workers can tokenize."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, padding: Padding = "longest"):
        self.tokenizer, self.max_length, self.padding = tokenizer, max_length, padding

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """B texts to input_ids and attention_mask (B, L) and what else the model takes, padded."""
        return self.pad(self.ids(texts))

    def ids(self, texts: list[str]) -> list[dict[str, list[int]]]:
        """The same for each text by itself, not padded."""
        columns = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def pad(self, ids: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """What ``ids`` gives, as one batch, padded to its longest or to ``max_length``."""
        padded = dict(self.tokenizer.pad(ids, padding=self.padding, max_length=self.max_length, return_tensors="pt"))
        if self.padding == "max_length":
            padded.pop("attention_mask", None)  # the network must see the padding
        return padded

    def identity(self) -> dict:
        """What decides the tokens, JSON-able."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        made_of = self.tokenizer.get_vocab() if backend is None else backend.to_str()
        return {
            "max_length": self.max_length,
            "padding_side": self.tokenizer.padding_side,
            "tokenizer": stable_hash([type(self.tokenizer).__name__, made_of]),
            **({} if self.padding == "longest" else {"padding": self.padding}),
        }


class HFTextEncoder(FrozenEncoder):
    """A sentence encoder or language model, and its tokenizer. No instruction prefix, no normalisation (SAIL).

    Args:
        name: repository, such as ``Alibaba-NLP/gte-large-en-v1.5``.
        weights: folder in the layout of that repository, or ``package://<import name>/<path>``; None: cache, then hub.
        pooling: of the last hidden states, see ``pool_text_tokens``: ``cls`` for gte-*-v1.5, ``last`` for gte-Qwen2, ``mean``
            for MPNet and MiniLM. ``pooler``: the model's own pooled output (CLIP). ``own``: the model returns sentence
            embeddings itself (NV-Embed-v2, whose latent attention pools under the mask).
        max_length: in tokens; longer captions are cut (SAIL: 1024, or what the model can take).
        padding: 'max_length' for a model that was trained to look at its padding: SigLIP. It then gets no mask.
        layers: also return every hidden state, the embedding first, pooled the same way.
        trust_remote_code: run the Python code that the checkpoint brings along (gte-*-v1.5 and NV-Embed need it).
        dtype: of weights and outputs. SAIL encodes in float16.

    Raises WeightsUnavailable without pretrained weights, CheckpointError if they are incomplete, UserError if the
    checkpoint brings code that was not trusted, ValueError for ``layers`` without a pooling of tokens.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        pooling: Literal["mean", "cls", "last", "pooler", "own"] = "mean",
        max_length: int = 1024,
        padding: Padding = "longest",
        layers: bool = False,
        trust_remote_code: bool = False,
        dtype: Dtype = "float32",
    ):
        super().__init__()
        if layers and pooling in ("pooler", "own"):
            raise ValueError("layers=True needs a pooling of tokens: mean, cls or last")
        self.source = path = find_weights(name, name, weights, OPTION)
        self.network = load_transformer(path, "text_model", DTYPES[dtype], pooling == "pooler", trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.pooling, self.with_layers = pooling, layers
        positions = getattr(self.network.config, "max_position_embeddings", max_length)
        # RoBERTa has two positions too many
        self.tokenize = Tokenize(tokenizer, min(max_length, positions, tokenizer.model_max_length), padding)
        self._freeze()
        probe = self(self.tokenize(["probe"]))
        self.feature_dim = probe.pooled.shape[-1]
        self.token_dim = self.feature_dim if probe.tokens is None else probe.tokens.shape[-1]
        config = network_identity(self.network, path if trust_remote_code else None)
        self._identify(name, pooling, layers, dtype, self.tokenize.identity(), config=config)

    @torch.no_grad()
    def forward(self, tokens: dict[str, Tensor]) -> Features:
        """The output of ``tokenize`` to Features; ``mask`` is True at real tokens."""
        mask = tokens.get("attention_mask")
        if mask is None:
            mask = (tokens["input_ids"] != self.tokenize.tokenizer.pad_token_id).long()
        if self.pooling == "own":
            out = self.network(input_ids=tokens["input_ids"], attention_mask=mask, pool_mask=mask)
            return Features(out["sentence_embeddings"].squeeze(1))
        out = self.network(**tokens, output_hidden_states=self.with_layers)
        states = out.last_hidden_state
        if self.pooling == "pooler":
            return Features(out.pooler_output, states, mask.bool())
        pooled = pool_text_tokens(states, mask, self.pooling)
        layers = None
        if self.with_layers:
            layers = torch.stack([pool_text_tokens(h, mask, self.pooling) for h in out.hidden_states], dim=1)
        return Features(pooled, states, mask.bool(), layers)
