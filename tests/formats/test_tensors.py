"""Quantized tensors as PyTorch sees them: copies, moves, views, saving, autograd, DTensor, and their own methods."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from lighterage.formats.quantized_tensor import rebuild
from lighterage.ops import linear
from lighterage.recipes import Float8BlockScaling
from tests.formats.cases import ALL, bytes_equal, same_codes
from tests.kernels.inputs import make_input

X = make_input("wide", 64, 96, torch.bfloat16)
every_format = pytest.mark.parametrize("name", ALL)


@every_format
def test_it_looks_like_what_was_quantized(name: str) -> None:
    q = ALL[name]()(X.view(4, 16, 96))
    assert (q.shape, q.dtype, q.device, q.requires_grad) == ((4, 16, 96), torch.bfloat16, X.device, False)
    text = repr(q)
    for word in (type(q).__name__, "shape=(4, 16, 96)", "torch.bfloat16", "usages=rowwise+columnwise", "device=cpu"):
        assert word in text
    q.update_usage(rowwise_usage=False)
    assert "usages=columnwise" in repr(q)


@every_format
def test_dequantize_gives_the_input_back_within_the_format(name: str) -> None:
    x = make_input("random", 64, 96, torch.bfloat16)
    q = ALL[name]()(x)
    coarse = 0.3 if "4" in name else 0.13 if "e5m2" in name else 0.07
    for rowwise in (True, False):
        if not rowwise:
            q.update_usage(rowwise_usage=False)
        back = q.dequantize(torch.float32)
        assert back.dtype == torch.float32 and q.dequantize().dtype == torch.bfloat16
        assert (back - x.float()).norm() < coarse * x.float().norm()


@pytest.mark.parametrize(
    "name", [name for name in ALL if "fp32" not in name and "4" not in name and "tensor" not in name]
)
@pytest.mark.parametrize("kind", ["random", "wide", "subnormal", "sparse", "zero"])
def test_quantizing_again_is_exact_with_power_of_two_scales(name: str, kind: str) -> None:
    quantizer = ALL[name]()
    x = make_input(kind, 64, 96, torch.float32)
    for direction in ("rowwise", "columnwise"):
        quantizer.set_usage(rowwise=direction == "rowwise", columnwise=direction == "columnwise")
        once = quantizer(x).dequantize()
        assert torch.equal(quantizer(once).dequantize(), once)


@every_format
def test_moving_and_copying_keep_the_codes(name: str) -> None:
    q = ALL[name]()(X)
    copies = {
        "clone": q.clone(),
        "deepcopy": copy.deepcopy(q),
        "pickle": pickle.loads(pickle.dumps(q)),
        "to copy": q.to("cpu", copy=True),
        "empty_like and copy_": torch.empty_like(q).copy_(q),
    }
    aliases = {"detach": q.detach(), "copy": copy.copy(q), "to": q.to("cpu"), "view": q.view(q.shape)}
    for how, other in (copies | aliases).items():
        assert same_codes(other, q), how
        shared = other.data_tensors()[0].data_ptr() == q.data_tensors()[0].data_ptr()
        assert shared == (how in aliases), how
    assert same_codes(q.detach(), q) and q.detach() is not q
    assert q.to("meta").device.type == "meta" and type(q.to("meta")) is type(q)


@every_format
def test_torch_save_and_load(name: str) -> None:
    q = ALL[name]()(X)
    for weights_only in (False, True):
        file = io.BytesIO()
        torch.save({"q": q}, file)
        file.seek(0)
        with torch.serialization.safe_globals([type(q), rebuild]):
            assert same_codes(torch.load(file, weights_only=weights_only)["q"], q)


@every_format
def test_changing_the_dtype_dequantizes(name: str) -> None:
    q = ALL[name]()(X)
    assert type(q.float()) is torch.Tensor and torch.equal(q.float(), q.dequantize(torch.float32))
    assert type(q.to("cpu", torch.float16)) is torch.Tensor


@every_format
def test_other_operators_see_the_values(name: str) -> None:
    q = ALL[name]()(X)
    values = q.dequantize()
    assert torch.equal(q + 1, values + 1)
    assert torch.equal(q @ values.t(), values @ values.t())
    assert torch.equal(q.t(), values.t()) and torch.equal(q[3], values[3])
    assert torch.equal(q.reshape(-1), values.view(-1))
    assert torch.equal(torch.cat([q, values]), torch.cat([values, values]))
    assert torch.equal(q, values)
    plain = torch.zeros_like(values)
    plain.copy_(q)
    assert torch.equal(plain, values)


@every_format
def test_leading_dimensions_regroup_without_touching_the_codes(name: str) -> None:
    q = ALL[name]()(X)
    for shape in ((4, 16, 96), (-1, 96), (2, 2, 16, 96)):
        view = q.view(shape)
        assert type(view) is type(q) and torch.equal(view.dequantize(), q.dequantize().view(shape))
        assert view.data_tensors()[0].data_ptr() == q.data_tensors()[0].data_ptr()
        assert same_codes(view.flatten(0, -2), q)
    with pytest.raises(RuntimeError, match="invalid for"):
        q.view(7, 96)


@every_format
def test_writing_in_place_is_an_error(name: str) -> None:
    q = ALL[name]()(X)
    for write in (lambda: q.add_(1), lambda: q.zero_(), lambda: torch.add(X, 1, out=q)):
        with pytest.raises(TypeError, match=r"cannot be written element by element.*quantizer.update"):
            write()
    with pytest.raises(TypeError, match=r"copy_ into .* needs a tensor of the same class"):
        q.copy_(X)
    other = ALL[name]()(X)
    other.update_usage(rowwise_usage=False)
    with pytest.raises(ValueError, match=r"needs \['rowwise_data"):
        q.copy_(other)


@every_format
def test_both_usages_can_go_and_come_back(name: str) -> None:
    q = ALL[name]()(X)
    whole = q.clone()
    saved, shell = q.prepare_for_saving()
    assert len(saved) == len(type(q).FIELDS) and shell.data_tensors() == () and same_codes(q, whole)
    q.update_usage(rowwise_usage=False, columnwise_usage=False)
    assert q.data_tensors() == () and q.shape == X.shape
    with pytest.raises(RuntimeError, match=r"holds no data: both usages were dropped.*restore_from_saved"):
        q.dequantize()
    with pytest.raises(ValueError, match=r"columnwise data of .* is asked for, but it is not there and has gone away"):
        q.update_usage(columnwise_usage=True)
    for empty in (q, shell):
        empty.restore_from_saved(saved)
        assert same_codes(empty, whole)


@every_format
def test_restoring_what_does_not_fit_is_refused(name: str) -> None:
    q = ALL[name]()(X)
    saved, shell = q.prepare_for_saving()
    with pytest.raises(ValueError, match=r"fields to restore .*; got 1 tensors"):
        shell.restore_from_saved(saved[:1])
    with pytest.raises(ValueError, match=r"rowwise_data of .* must have shape, dtype and device"):
        shell.restore_from_saved([saved[0].float(), *saved[1:]])
    with pytest.raises(ValueError, match=r"rowwise_data of .* must have shape, dtype and device"):
        shell.restore_from_saved([saved[0][1:], *saved[1:]])
    assert shell.data_tensors() == (), "a refused restore changes nothing"


@every_format
def test_a_missing_direction_is_made_only_where_that_is_exact(name: str) -> None:
    whole = ALL[name]()(X)
    exact = name in ("fp8_block_2d", "nvfp4_2d", "fp8_tensor")
    for dropped in ("rowwise", "columnwise"):
        q = whole.detach()
        q.update_usage(**{f"{dropped}_usage": False})
        assert getattr(q, f"{dropped}_data") is None
        if exact:
            q.update_usage(**{f"{dropped}_usage": True})
            assert same_codes(q, whole)
        else:
            with pytest.raises(ValueError, match=rf"{dropped} data of .* cannot be made exactly.*Quantize with"):
                q.update_usage(**{f"{dropped}_usage": True})
    q = whole.detach()
    q.update_usage()
    assert same_codes(q, whole), "None changes nothing"


def test_derived_directions_of_ragged_blocks() -> None:
    for shape in ((130, 300), (1, 1), (3, 2, 129), (0, 128)):
        whole = ALL["fp8_block_2d"]()(torch.randn(shape))
        q = whole.detach()
        q.update_usage(columnwise_usage=False)
        q.update_usage(columnwise_usage=True)
        q.update_usage(rowwise_usage=False)
        q.update_usage(rowwise_usage=True)
        assert same_codes(q, whole)


@every_format
def test_flatten_names_plain_tensors_and_unflatten_follows_their_device(name: str) -> None:
    q = ALL[name]()(X)
    names, context = q.__tensor_flatten__()
    inner = {field: getattr(q, field) for field in names}
    assert all(type(value) is torch.Tensor for value in inner.values())
    again = type(q).__tensor_unflatten__(inner, context, q.shape, q.stride())
    assert same_codes(again, q)
    moved = type(q).__tensor_unflatten__({k: v.to("meta") for k, v in inner.items()}, context, q.shape, q.stride())
    assert moved.device.type == "meta"
    q.update_usage(False, False)
    names, context = q.__tensor_flatten__()
    empty = type(q).__tensor_unflatten__({}, context, q.shape, q.stride())
    assert names == [] and same_codes(empty, q)


class _Scale(torch.autograd.Function):
    """y = w; dw = g * dequantize(saved)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, w: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q)
        return w.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        (q,) = ctx.saved_tensors
        return g * q.dequantize(), None


@every_format
def test_saved_for_backward_with_and_without_hooks(name: str) -> None:
    q = ALL[name]()(X)
    for hooks in (False, True):
        w = X.detach().clone().requires_grad_()
        if hooks:
            with torch.autograd.graph.save_on_cpu():
                y = _Scale.apply(w, q)
        else:
            y = _Scale.apply(w, q)
        y.sum().backward()
        assert torch.equal(w.grad, q.dequantize())


@every_format
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_parameter_stays_one_when_it_is_copied_or_saved(name: str, requires_grad: bool) -> None:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(ALL[name]()(X), requires_grad=requires_grad)
    if requires_grad:
        (module.weight * 2).sum().backward()
        assert torch.equal(copy.deepcopy(module).weight.grad, torch.full_like(X, 2))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert isinstance(other.weight, torch.nn.Parameter) and other.weight.requires_grad == requires_grad
        assert same_codes(other.weight, module.weight)
    assert not isinstance(copy.deepcopy(module.weight.detach()), torch.nn.Parameter)


@every_format
def test_assigned_data_brings_its_codes(name: str) -> None:
    """As modules and FSDP move parameters."""
    quantizer = ALL[name]()
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(quantizer(X), requires_grad=False)
    same = module.weight
    same.data = quantizer(X[:32] * 3)
    assert same is module.weight and isinstance(same, torch.nn.Parameter) and same.shape == (32, 96)
    assert same_codes(same, quantizer(X[:32] * 3))
    same.data = quantizer(X)
    assert same_codes(same.data, quantizer(X)) and type(same.data) is type(same)
    for values in (X, X.float(), None):
        with pytest.raises(TypeError, match="must be a tensor of its class"):
            same.data = values
    with pytest.raises(TypeError, match="to cast a module"):
        module.float()
    assert same_codes(same, quantizer(X)) and same.dtype == X.dtype


@every_format
def test_a_leaf_requires_its_gradient_when_it_is_copied(name: str) -> None:
    q = ALL[name]()(X).requires_grad_()
    for other in (copy.deepcopy(q), copy.copy(q), pickle.loads(pickle.dumps(q))):
        assert other.requires_grad and other.is_leaf and not isinstance(other, torch.nn.Parameter)


@every_format
def test_codes_are_not_lost_in_a_tensor_that_has_gone_away(name: str) -> None:
    quantizer = ALL[name]()
    out = quantizer(X)
    out.update_usage(rowwise_usage=False, columnwise_usage=False)
    with pytest.raises(ValueError, match="both usages"):
        quantizer.update(X, out)
    with pytest.raises(ValueError, match="both usages"):
        out.copy_(quantizer(X))


def test_deep_copies_of_one_buffer_share_one_buffer_again() -> None:
    q = ALL["nvfp4"]()(X)
    both = copy.deepcopy([q, q.detach()])
    first = {value.untyped_storage().data_ptr() for value in both[0].data_tensors()}
    assert len(first) == 2, "one for each direction"
    assert first == {value.untyped_storage().data_ptr() for value in both[1].data_tensors()}


@pytest.fixture
def mesh() -> Iterator[object]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensor_wraps_it_and_flattens_through(mesh: object) -> None:
    for make in ALL.values():
        q = make()(X)
        wrapped = DTensor.from_local(q, mesh, [Shard(0)])
        assert same_codes(wrapped.to_local(), q) and wrapped.shape == X.shape
        assert "_local_tensor" in wrapped.__tensor_flatten__()[0]
        names, _ = wrapped._local_tensor.__tensor_flatten__()
        assert all(bytes_equal(getattr(wrapped._local_tensor, field), getattr(q, field)) for field in names)


def test_a_dtensor_is_not_quantized_but_its_part_is(mesh: object) -> None:
    whole = distribute_tensor(X, mesh, [Shard(0)])
    for make in ALL.values():
        with pytest.raises(TypeError, match=r"to_local\(\)"):
            make()(whole)
        assert same_codes(make()(whole.to_local()), make()(X))
    for x, weight in ((whole, X), (X, whole), (whole, whole)):
        with pytest.raises(TypeError, match=r"to_local\(\)"):
            linear(x, weight, recipe=Float8BlockScaling())


def test_compiled_functions_take_it_and_give_it_back() -> None:
    q = ALL["fp8_block"]()(X)
    assert same_codes(torch.compile(lambda t: t, backend="eager")(q), q)
