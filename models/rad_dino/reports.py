"""Reports from frozen patch features: a projector and a causal language model, as LLaVA joins them (arXiv 2304.08485).

Shapes: B images, N patches, D width of the features, L tokens of a report with its end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from models.batch import IGNORE_INDEX
from models.metrics.text_overlap import bleu, rouge_l

END = 0  # of :class:`WordVocabulary`
UNKNOWN_WORD = 1
# Words of which one in a sentence names a finding; other findings are named by themselves.
WORDS: Mapping[str, Sequence[str]] = {
    "Cardiomegaly": ("cardiomegaly", "heart is enlarged", "heart is not enlarged", "enlarged heart"),
    "Enlarged Cardiomediastinum": ("mediastinum is widened", "widened mediastinum"),
    "Pleural Effusion": ("effusion",),
    "Lung Opacity": ("opacity", "opacities"),
    "Lung Lesion": ("nodule", "mass", "lesion"),
    "Atelectasis": ("atelectasis", "atelectatic"),
    "Consolidation": ("consolidation",),
    "Support Devices": ("tube", "catheter", "pacemaker", "line is", "drain"),
}
NEGATIONS = re.compile(r"\b(no|not|without|absent|negative for|free of|resolved)\b")


class Tokenizer(Protocol):
    """What is asked of a tokenizer: transformers' do it, too."""

    eos_token_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Writer(NamedTuple):
    """A causal language model of transformers and its tokenizer."""

    model: Any
    tokenizer: Tokenizer


class WordVocabulary:
    """Words and full stops of the training reports as tokens, for language models that begin from nothing."""

    eos_token_id = END

    def __init__(self, reports: Iterable[str]):
        self.words = ["", "?", *sorted({word for report in reports for word in _tokens(report)})]
        self.ids = {word: number for number, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(word, UNKNOWN_WORD) for word in _tokens(text)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(self.words[number] for number in ids if number != END).replace(" .", ".")


def small_writer(reports: Sequence[str], width: int = 64, layers: int = 2, heads: int = 4, positions: int = 512) -> Writer:
    """A GPT-2 of a few hundred thousand random weights over the words of ``reports``."""
    vocabulary = WordVocabulary(reports)
    config = GPT2Config(
        vocab_size=len(vocabulary.words), n_embd=width, n_layer=layers, n_head=heads, n_positions=positions,
        bos_token_id=END, eos_token_id=END,
    )  # fmt: skip
    return Writer(GPT2LMHeadModel(config), vocabulary)


def pretrained_writer(reports: Sequence[str], name: str) -> Writer:
    """A causal language model of transformers with its own tokenizer, such as Vicuna.

    Args:
        reports: not needed.
        name: on the Hugging Face hub, or a folder.
    """
    return Writer(AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name))


class ReportModel(nn.Module):
    """Patches through an MLP with GELU into the language model's input, before the report.

    Args:
        dim: D.
        writer: the language model, which is trained, too.
        layers: of the MLP.
    """

    def __init__(self, dim: int, writer: Writer, layers: int = 2):
        super().__init__()
        self.language, self.tokenizer = writer
        width = self.language.get_input_embeddings().weight.shape[1]
        parts: list[nn.Module] = [nn.Linear(dim, width)]
        for _ in range(layers - 1):
            parts += [nn.GELU(), nn.Linear(width, width)]
        self.projector = nn.Sequential(*parts)

    def tokens(self, reports: Sequence[str]) -> Tensor:
        """(B, L) ids with the end, then IGNORE_INDEX."""
        ids = [torch.tensor([*self.tokenizer.encode(report), self.tokenizer.eos_token_id]) for report in reports]
        return pad_sequence(ids, batch_first=True, padding_value=IGNORE_INDEX)

    def forward(self, patches: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens (B, L) behind the patches (B, N, D)."""
        prefix = self.projector(patches)
        known = ids[:, :-1].clamp_min(0)
        inputs = torch.cat([prefix, self.language.get_input_embeddings()(known)], dim=1)
        logits = self.language(inputs_embeds=inputs).logits[:, prefix.shape[1] - 1 :]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), ignore_index=IGNORE_INDEX)

    @torch.no_grad()
    def write(self, patches: Tensor, longest: int) -> list[str]:
        """The likeliest next token again and again, up to ``longest`` tokens: B reports."""
        inputs, cache, ids = self.projector(patches), None, []
        ended = torch.zeros(len(patches), dtype=torch.bool, device=patches.device)
        for _ in range(longest):
            output = self.language(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
            cache, token = output.past_key_values, output.logits[:, -1].argmax(dim=1)
            ended |= token == self.tokenizer.eos_token_id
            ids.append(token.masked_fill(ended, self.tokenizer.eos_token_id))
            if bool(ended.all()):
                break
            inputs = self.language.get_input_embeddings()(token)[:, None]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in torch.stack(ids, dim=1).tolist()]


def train_reports(
    model: ReportModel, patches: Tensor, reports: Sequence[str], steps: int, batch_size: int, lr: float, seed: int
) -> ReportModel:
    """Projector and language model by AdamW, with a rate that falls by a cosine to 0. Returns the model in eval mode.

    Args:
        model: with the language model.
        patches: (M, N, D) of the training images, also in half precision.
        reports: M texts.
        steps: of the optimiser.
        batch_size: reports per step, drawn with replacement.
        lr: first rate.
        seed: of the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    device = next(model.parameters()).device
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(patches), (batch_size,), generator=generator)
        ids = model.tokens([reports[row] for row in rows.tolist()])
        loss = model(patches[rows].to(device).float(), ids.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


Labels = Callable[[str, Sequence[str]], list[int]]


def named_findings(report: str, names: Sequence[str]) -> list[int]:
    """1 for each of ``names`` that a sentence of the report affirms, else 0.

    A sentence affirms a finding if one of its :data:`WORDS` is in it and none of the :data:`NEGATIONS`. A rule for simulated
    and simple reports. It is no CheXbert; another function of the same form can take its place.
    """
    present = [0] * len(names)
    for sentence in re.split(r"[.;\n]", report.lower()):
        if not NEGATIONS.search(sentence):
            for number, name in enumerate(names):
                present[number] |= any(word in sentence for word in WORDS.get(name, (name.lower(),)))
    return present


def report_metrics(
    generated: Sequence[str], references: Sequence[str], names: Sequence[str], labels: Labels = named_findings
) -> dict[str, float]:
    """BLEU-4, ROUGE-L, and micro and macro F1 of the findings that ``labels`` reads in both, in percent.

    The macro F1 is over the findings that a reference or a generated report names.
    """
    metrics = {"bleu4": 100 * bleu(generated, references), "rouge_l": 100 * rouge_l(generated, references)}
    if not names:
        return metrics
    named, true = (torch.tensor([labels(text, names) for text in texts]).bool() for texts in (generated, references))
    hits, sizes = (named & true).sum(dim=0).double(), (named.sum(dim=0) + true.sum(dim=0)).double()
    metrics["findings_f1_macro"] = 100 * float((2 * hits / sizes).nanmean())
    metrics["findings_f1_micro"] = 100 * float(2 * hits.sum() / sizes.sum().clamp_min(1))
    return metrics


def _tokens(report: str) -> list[str]:
    return re.findall(r"\w+|\.", report.lower())
