"""A mypy plugin: what a torch module takes from `nn.Module.__getattr__` (submodules, parameters, buffers) is Any.

torch declares it as `Tensor | Module`, so that each call of a submodule and each use of a buffer would be an error.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

TORCH_NAMES = {"torch._tensor.Tensor", "torch.nn.modules.module.Module"}


class TorchModuleAttributes(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _any_for_tensor_or_module


def _any_for_tensor_or_module(context: AttributeContext) -> Type:
    declared = get_proper_type(context.default_attr_type)
    if isinstance(declared, UnionType):
        names = {item.type.fullname for item in map(get_proper_type, declared.items) if hasattr(item, "type")}
        if names == TORCH_NAMES:
            return AnyType(TypeOfAny.special_form)
    return declared


def plugin(version: str) -> type[Plugin]:
    return TorchModuleAttributes
