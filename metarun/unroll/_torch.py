"""What the package uses of torch that torch does not promise to keep.

All of it comes by here, under torch's own names without a leading underscore. So this is where an
upgrade of torch can break something, and `tests/unroll/test_torch_door.py` says so.
"""

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import _check as check
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch._C import _get_function_stack_at as get_function_stack_at
from torch._C import _len_torch_function_stack as len_torch_function_stack
from torch._C import _pop_torch_function_stack as pop_torch_function_stack
from torch._C import _push_on_torch_function_stack as push_on_torch_function_stack
from torch._C._functorch import TransformType as TransformType
from torch._C._functorch import _vmap_decrement_nesting as vmap_decrement_nesting
from torch._C._functorch import _vmap_increment_nesting as vmap_increment_nesting
from torch._C._functorch import get_unwrapped as get_unwrapped
from torch._C._functorch import is_batchedtensor as is_batchedtensor
from torch._C._functorch import is_functorch_wrapped_tensor as is_functorch_wrapped_tensor
from torch._C._functorch import maybe_current_level as maybe_current_level
from torch._C._functorch import maybe_get_bdim as maybe_get_bdim
from torch._C._functorch import maybe_get_level as maybe_get_level
from torch._C._functorch import unwrap_if_dead as unwrap_if_dead
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters as retrieve_all_functorch_interpreters,
)
from torch._functorch.pyfunctorch import (
    temporarily_clear_interpreter_stack as temporarily_clear_interpreter_stack,
)
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.utils import _pytree as pytree  # what torch.func itself maps over
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode as get_current_dispatch_mode

__all__ = [
    "ConvNd",
    "NormBase",
    "check",
    "disable_current_modes",
    "get_current_dispatch_mode",
    "get_function_stack_at",
    "len_torch_function_stack",
    "pop_torch_function_stack",
    "push_on_torch_function_stack",
    "pytree",
    "vmap_decrement_nesting",
    "vmap_increment_nesting",
]

foreach_copy: Any = torch._foreach_copy_
"""Copies of a list of tensors to another, in few kernels."""


def clear_cublas_workspaces() -> None:
    """Give back what cuBLAS keeps for its products on each stream."""
    torch._C._cuda_clearCublasWorkspaces()


weight_norm_kernels: tuple[Any, Any] = (torch._weight_norm, torch._weight_norm_interface)
"""torch's fused weight normalisation, and the same with the norm beside it."""


solve_operation: Any = torch.ops.aten._linalg_solve_ex.default
"""What `torch.linalg.solve_ex` is in an exported program."""


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether something is called before or after each step of an optimizer."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Whether something is called with the gradient of a tensor."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def inductor() -> tuple[Any, Any]:
    """inductor's settings and `standalone_compile`. They take a second to import."""
    from torch._inductor import config, standalone_compile

    _remember_indices()
    return config, standalone_compile


@cache
def _remember_indices() -> None:
    """Have inductor simplify each index once.

    Its kernels for a CPU look at the same indices again and again, and it remembers the last 128
    of them: what it did over took a quarter of the time of compiling a meta-step.
    """
    from torch._inductor import sizevars
    from torch._inductor.codegen import cpp

    for name in ("simplify_index_in_vec_range", "stride_at_vec_range"):
        forgetful = getattr(sizevars, name, None)
        plain = getattr(forgetful, "__wrapped__", None)
        if plain is None:  # another torch
            continue
        remembering = cache(plain)
        for module in (sizevars, cpp):
            if getattr(module, name, None) is forgetful:
                setattr(module, name, remembering)


def described_once() -> AbstractContextManager[Any]:
    """A block in which `make_fx` describes all results by one mode.

    It makes one for each operation otherwise, which takes longer than the operation itself.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode

    return tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))


def import_forward_rules() -> None:
    """Import the rules for forward mode that torch compiles at their first use."""
    import torch._decomp.decompositions_for_jvp  # noqa: F401


def allow_tf32(allowed: bool) -> bool:
    """Let a GPU's products and convolutions compute in TensorFloat-32, or in float32 alone.

    Returns:
        Whether its convolutions did before.
    """
    before: bool = torch._C._get_cudnn_allow_tf32()
    torch._C._set_cudnn_allow_tf32(allowed)
    torch._C._set_cublas_allow_tf32(allowed)
    return before


def set_cudnn(*, enabled: bool | None = None, exact: bool = False) -> bool:
    """Switch cuDNN on or off, or let it compute in full precision, by one algorithm.

    torch's own attributes refuse that once its test tools have been imported, and its context
    manager changes all flags together.

    Args:
        enabled: whether it is used; None: as it is.
        exact: neither TensorFloat-32, nor a search for the fastest algorithm of this run.

    Returns:
        Whether it was used before.
    """
    before: bool = torch._C._get_cudnn_enabled()
    if enabled is not None:
        torch._C._set_cudnn_enabled(enabled)
    if exact:
        torch._C._set_cudnn_allow_tf32(False)
        torch._C._set_cudnn_benchmark(False)
    return before
