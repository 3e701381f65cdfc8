"""How much is worked on at once, by device and by the memory that is free on it: the one place for tiles and chunks.

The sizes change time and memory, never a result beyond rounding. On a CPU they follow the caches and were measured on two
cores; on a GPU a tile should be as large as memory allows, since every tile costs launches and partial sums. Measured on an
H200 (torch 2.11, bfloat16, 32,768 pairs of width 1,024): InfoNCE in tiles of 2^22 / 2^24 / 2^26 / 2^28 entries took 265 / 75 /
55 / 50 ms, the sigmoid loss of two captions 209 / 80 / 58 / 52 ms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

GPU_ENTRIES = 2**28  # of a matrix at most: beyond it the time no longer falls
GPU_SHARE = 0.25  # of the free memory that one piece of work may take: parameters, activations and gradients need the rest


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that can still be allocated: free on the card, or held by torch without a tensor in it.

    Neither question waits for the work that is under way on the device.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class Tile(NamedTuple):
    """Entries of a matrix that are worked on at once.

    Args:
        cpu: entries on a CPU.
        bytes_per_entry: memory at the peak for each entry of a tile in float32, temporaries among it.
    """

    cpu: int
    bytes_per_entry: int

    def entries(self, device: torch.device) -> int:
        """On a GPU the largest power of two up to ``GPU_ENTRIES`` that fits, and never less than on a CPU."""
        if device.type != "cuda":
            return self.cpu
        fitting = int(GPU_SHARE * free_bytes(device)) // self.bytes_per_entry
        return max(self.cpu, min(GPU_ENTRIES, 2 ** max(fitting, 1).bit_length() // 2))

    def rows(self, device: torch.device, columns: int) -> int:
        """Rows of a tile of whole rows, at least one."""
        return max(1, self.entries(device) // max(columns, 1))


# The logits of a contrastive loss: 16 MB on a CPU, where larger tiles are no faster. The product, its float32 copy, a
# temporary of the loss and the gradient in the product's type are there at once.
LOGITS = Tile(cpu=2**22, bytes_per_entry=16)
# Logits of InfoNCE that wait for the backward pass and spare a product. On a CPU 256 MB; on a GPU as much, which holds a matrix
# of 8,192 pairs whole, where the product and its launch are a large part of the time.
KEPT_LOGITS = 2**26
# Scores of a retrieval: 25 MB on a CPU, since with fewer the matrix product loses speed. Scores and two rounds of flags.
SCORES = Tile(cpu=3 * 2**21, bytes_per_entry=12)
# Comparisons of scores: what a CPU's cache holds. On a GPU a whole tile of scores is compared at once.
FLAGS = Tile(cpu=2**19, bytes_per_entry=12)
# Similarities of which the largest of each row are wanted. 16 MB on a CPU; topk returns values and int64 indices.
NEIGHBOURS = Tile(cpu=2**22, bytes_per_entry=24)
# The same for few columns of long rows, where topk costs less than the product.
VOTES = Tile(cpu=2**24, bytes_per_entry=24)
# Entries of the divergence of two random walks: 8 MB on a CPU; six temporaries.
WALKS = Tile(cpu=2**21, bytes_per_entry=24)
# Logits of a batch against a momentum queue. 4,096 columns of 96 queries on a CPU; logits and their exponentials.
QUEUE = Tile(cpu=96 * 4096, bytes_per_entry=12)
# Logits of DINO's prototypes, whole rows, 16 MB on a CPU; beside them their targets and two copies in the product's type.
PROTOTYPES = Tile(cpu=2**22, bytes_per_entry=16)

CPU_ROWS = 512  # of a gated projector: their hidden layer stays in the cache; fewer make the products slower
# Numbers of a content-aware convolution for each core: its second-level cache keeps them beside weights and sum.
CPU_VALUES = 2**17


def hidden_rows(device: torch.device, rows: int, hidden: int, itemsize: int) -> int:
    """Rows of a gated projector that pass through its hidden layer at once.

    On a GPU all of them where they fit: in chunks of 512 the float32 accumulation of the weights' gradients cost more than all
    products. SAIL's step at 32,768 pairs took 361 ms on an H200 in such chunks, 108 ms in chunks of 4,096 and 98 ms in one.

    Args:
        device: of the rows.
        rows: all of them.
        hidden: width of the hidden layer; the two branches, their gradients and two temporaries are six of it.
        itemsize: bytes of a number.
    """
    if device.type != "cuda":
        return CPU_ROWS
    fitting = int(GPU_SHARE * free_bytes(device)) // (6 * hidden * itemsize)
    return rows if rows <= fitting else max(CPU_ROWS, 2 ** fitting.bit_length() // 2)


def fits(device: torch.device, needed: int) -> bool:
    """Whether a form that needs ``needed`` bytes and is faster on a GPU alone may be taken."""
    return device.type == "cuda" and needed <= GPU_SHARE * free_bytes(device)
