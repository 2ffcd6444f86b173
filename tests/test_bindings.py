"""What the extension's entry points refuse by themselves, whoever calls them."""

import pytest
import torch
from torch.utils import _pytree as pytree

from fusednn.core import native

from . import registry

OPS = [op for place, op in registry.kernels() if place.name == "cpu"]


@pytest.mark.parametrize("op", OPS)
def test_cpu_kernels_refuse_other_devices(op):
    """A tensor on meta has no memory."""
    for name, arguments in registry.cases_of(op).items():
        moved = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to("meta"), arguments)
        with pytest.raises(RuntimeError, match="expected cpu"):
            getattr(native.extension.cpu, op)(*moved)
        assert name
