"""SAIL's gated layer in the official order of operations, every intermediate kept by autograd."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.alignment.projectors import GatedProjector


class SeparateGated(nn.Module):
    """Two separate input maps, clamps on both, ReLU6, product, output map; with the weights of a ``GatedProjector``."""

    def __init__(self, projector: GatedProjector):
        super().__init__()
        self.clamp, self.f1, self.f2, self.g = (
            projector.clamp,
            self._linear(projector, 0),
            self._linear(projector, 1),
            projector.down,
        )

    @staticmethod
    def _linear(projector: GatedProjector, half: int) -> nn.Linear:
        joint = projector.gate_and_value
        linear = nn.Linear(joint.in_features, joint.out_features // 2, device="meta")
        linear.weight = nn.Parameter(joint.weight.detach().chunk(2)[half].clone())
        linear.bias = nn.Parameter(joint.bias.detach().chunk(2)[half].clone())
        return linear

    def forward(self, x: Tensor) -> Tensor:
        gate = self.f1(x).clamp(-self.clamp, self.clamp)
        value = self.f2(x).clamp(-self.clamp, self.clamp)
        return self.g(F.relu6(gate) * value)
