"""What evaluation suites take and give: the embeddings of a dual encoder, or a trained module and a split for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from models.batch import SKIPPED

if TYPE_CHECKING:
    from datamodules.base import BaseDataModule
    from lightning_modules.base import BaseModule
    from models.alignment.dual_encoder import DualEncoder


@dataclass
class EmbeddedSplit:
    """One split seen by a dual encoder; all tensors on the CPU.

    ``image`` (N, D) and ``text`` (M, D) embeddings, ``owner`` (M,) the image row of each text, ``labels`` (N,) or None,
    ``captions`` the M texts, ``encode_text`` raw strings to embeddings, ``load_image`` an image row to its picture,
    ``load_encoders`` gives the model itself, built when it is first asked for, ``labelled_features`` a split's name to its
    frozen image features (N, D) and labels (N,), ``frozen`` the frozen vectors that the embeddings were made of, (N, Dv) and
    (M, Dt), or None where the head takes single tokens.
    """

    image: Tensor
    text: Tensor
    owner: Tensor
    captions: Sequence[str]
    encode_text: Callable[[list[str]], Tensor]
    load_image: Callable[[int], Image.Image]
    labels: Tensor | None = None
    class_names: list[str] | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    name: str = "test"
    load_encoders: Callable[[], DualEncoder] | None = None
    labelled_features: Callable[[str], tuple[Tensor, Tensor]] | None = None
    frozen: Callable[[], tuple[Tensor, Tensor]] | None = None

    @property
    def encoders(self) -> DualEncoder:
        return self.load_encoders()


@dataclass
class TrainedSplit:
    """A trained module, in eval mode on its device, and the split it is judged on: what the suites of methods that train
    on raw data take."""

    module: BaseModule
    data: BaseDataModule
    name: str

    def batches(self) -> Iterator[dict[str, Any]]:
        """The split's batches in the order of its rows, on the module's device; what cannot be read is counted, not given."""
        for batch in self.data.evaluation_dataloader(self.name):
            self.data.report_skipped(self.name, batch.pop(SKIPPED, []))
            if len(batch["index"]):
                yield self.module.transfer_batch_to_device(batch, self.module.device, 0)


@dataclass
class SuiteResult:
    """What a suite found, by flat metric name (percent unless the name says otherwise).

    ``baselines`` are columns beside ``metrics``: what chance, a majority vote or another trivial answer would reach.
    ``pictures`` maps a name to a function that draws the picture into the file it is given.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, Callable[[Path], Any]] = field(default_factory=dict)
