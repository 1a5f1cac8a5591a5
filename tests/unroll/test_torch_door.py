"""What is used of torch beyond its promises does what the engine takes for granted."""

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from metarun.unroll import _torch as door
from metarun.unroll.gradients.inner import load_forward_rules


def test_levels_of_torch_func_can_be_told() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        level = door.maybe_current_level()
        inside = door.is_batchedtensor(x), door.maybe_get_level(x), door.maybe_get_bdim(x)
        with door.temporarily_clear_interpreter_stack():
            cleared = door.maybe_current_level()
        kinds = [i.key() for i in door.retrieve_all_functorch_interpreters()]
        seen.append((level, inside, cleared, kinds, tuple(door.get_unwrapped(x).shape)))
        return x

    x = torch.zeros(3, 2)
    torch.func.vmap(look)(x)
    assert seen == [(1, (True, 1, 0), None, [door.TransformType.Vmap], (3, 2))]
    assert door.maybe_current_level() is None
    assert not door.is_functorch_wrapped_tensor(x) and door.unwrap_if_dead(x) is x
    assert door.vmap_increment_nesting(1, "same") == 1
    door.vmap_decrement_nesting()


def test_modes_can_be_taken_off() -> None:
    class Mode(door.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError("the mode is off")

    with Mode() as mode:
        assert door.get_current_dispatch_mode() is mode
        with door.disable_current_modes():
            torch.zeros(1).add(1)

    class Function(TorchFunctionMode):
        pass

    with Function() as function:
        assert door.get_function_stack_at(door.len_torch_function_stack() - 1) is function
        door.pop_torch_function_stack()
        door.push_on_torch_function_stack(function)
    assert door.len_torch_function_stack() == 0


def test_inductor_simplifies_each_index_once() -> None:
    door.inductor()
    from torch._inductor import sizevars
    from torch._inductor.codegen import cpp

    assert cpp.stride_at_vec_range is sizevars.stride_at_vec_range
    for kept in (sizevars.stride_at_vec_range, sizevars.simplify_index_in_vec_range):
        assert kept.cache_info().maxsize is None
    x = sympy.Symbol("x", integer=True)
    assert sizevars.stride_at_vec_range(3 * x + 1, x, 16) == 3


def test_kernels_classes_and_trees_are_those_that_are_meant() -> None:
    v, g = torch.rand(2, 3), torch.rand(2, 1)
    fused, with_norm = door.weight_norm_kernels
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    torch.testing.assert_close(fused(v, g, 0), v * g / norm)
    torch.testing.assert_close(with_norm(v, g, 0), (v * g / norm, norm))
    copies = [torch.zeros(2), torch.zeros(1, dtype=torch.int64)]
    door.foreach_copy(copies, [torch.ones(2), torch.tensor([3])])
    assert [copy.tolist() for copy in copies] == [[1.0, 1.0], [3]]
    assert issubclass(torch.nn.Conv2d, door.ConvNd)
    assert issubclass(torch.nn.BatchNorm2d, door.NormBase)
    assert door.pytree.tree_map(lambda x: x + 1, {"a": [1, (2,)]}) == {"a": [2, (3,)]}
    load_forward_rules()
    config, compiler = door.inductor()
    assert isinstance(config.cpp_wrapper, bool) and callable(compiler)
    assert isinstance(config.cpp_wrapper_build_separate, bool)


def test_results_of_a_recording_are_described_by_one_mode() -> None:
    with door.described_once():
        graph = make_fx(lambda x: (x * 2).sin())(torch.ones(2))
    described = [n.meta["val"] for n in graph.graph.nodes if "val" in n.meta]
    assert len(described) == 3 and all(value.shape == (2,) for value in described)
    assert len({id(value.fake_mode) for value in described}) == 1
