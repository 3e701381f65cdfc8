import torch
from torch import nn

from models.alignment.head import AlignmentHead
from models.alignment.projectors import GatedProjector
from models.optim.parameter_groups import split_by_decay


def names_in(group, module):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def test_sail_head_decays_matrices_alone():
    head = AlignmentHead(6, 4, 5, GatedProjector)
    decayed, spared = split_by_decay(head.named_parameters())
    matrices = {name for name, parameter in head.named_parameters() if parameter.ndim == 2}
    assert names_in(decayed, head) == matrices and "weight_decay" not in decayed
    assert names_in(spared, head) == {name for name, _ in head.named_parameters()} - matrices
    assert spared["weight_decay"] == 0.0


def test_words_spare_matrices_and_frozen_parameters_are_left_out():
    module = nn.ModuleDict({"ln_post": nn.Linear(2, 2), "fc": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    module["frozen"].requires_grad_(False)
    decayed, spared = split_by_decay(module.named_parameters())
    assert names_in(decayed, module) == {"fc.weight"}
    assert names_in(spared, module) == {"fc.bias", "ln_post.weight", "ln_post.bias"}
    assert torch.optim.AdamW([decayed, spared], weight_decay=0.3).param_groups[0]["weight_decay"] == 0.3
