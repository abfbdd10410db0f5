"""Law 1, same bits: loss, gradients and every unpacked tensor are bitwise those of the run without offload."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import lighterage
from tests.engine.programs import (
    WIDTH,
    Layer,
    Save,
    Stack,
    assert_nothing_left,
    assert_same_bits,
    batch,
    bits,
    both_tiers,
    every_plan,
    mlp_layer,
    mlp_stack,
    offloaded,
    train,
)

W = (WIDTH, WIDTH)


# --- every plan, on a plain stack ---------------------------------------------------------------------------------


@both_tiers
@every_plan
def test_a_stack_of_layers_gives_the_same_bits_under_every_plan(tier: str, plan: dict[str, Any]) -> None:
    assert_same_bits(mlp_stack, train(batch()), tier=tier, **plan)


@pytest.mark.parametrize("min_bytes", [0, 64, 4096, WIDTH * WIDTH * 4])
def test_every_threshold_gives_the_same_bits(min_bytes: int) -> None:
    assert_same_bits(mlp_stack, train(batch()), min_bytes=min_bytes)


def test_a_threshold_above_every_allocation_moves_nothing() -> None:
    assert_same_bits(mlp_stack, train(batch()), min_bytes=1 << 30, moves=False)


# --- programs made of PyTorch's own operations --------------------------------------------------------------------


def _mm_with_own_transpose(x: Tensor, w: Tensor) -> Tensor:
    a = x * w
    return torch.mm(a, a.t())


def _overlapping_slices(x: Tensor, w: Tensor) -> Tensor:
    h = x * w
    return F.pad(h[:-8].sin() * h[8:].cos(), (0, 0, 4, 4))


def _windows(x: Tensor, w: Tensor) -> Tensor:
    h = (x * w).flatten()
    return h.unfold(0, 64, 16).exp().sum(1).sum() * x


def _chunked_qkv(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (part.view(WIDTH, 4, -1).transpose(0, 1) for part in (x @ w).chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(WIDTH, WIDTH)


def _interleaved_qkv(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (x @ w).view(WIDTH, 4, 3, 8).unbind(2)
    weights = torch.einsum("nhd,mhd->hnm", q, k).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v).reshape(WIDTH, WIDTH)


def _chunked_swiglu(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    gate, up = (x @ w).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ out


def _non_contiguous(x: Tensor, w: Tensor) -> Tensor:
    h = (x @ w)[:, ::2].t()
    return torch.cat([h.exp(), h.sin()]).t() * h.std()


def _expanded(x: Tensor, w: Tensor) -> Tensor:
    row = (x * w)[:1].expand(WIDTH, WIDTH)
    return row.sin() * row * x


def _complex(x: Tensor, w: Tensor) -> Tensor:
    z = torch.view_as_complex((x * w).view(WIDTH, -1, 2))
    return torch.view_as_real((z * z.conj()).exp() * z).reshape(WIDTH, WIDTH)


def _conj_view(x: Tensor, w: Tensor) -> Tensor:
    z = torch.complex(x, x * w)
    return (z.conj().mH @ z.conj()).abs()


def _neg_view(x: Tensor, w: Tensor) -> Tensor:
    z = torch.complex(x, x * w).conj()
    return (z.imag * z.imag).tanh() * z.real


def _bool_masks(x: Tensor, w: Tensor) -> Tensor:
    h = F.dropout(F.relu(x @ w), 0.3, training=True)
    return torch.where(h > 0.1, h, x).masked_fill(h > 1.0, 0.5)


def _integer_indices(x: Tensor, w: Tensor) -> Tensor:
    order = (x @ w).argsort(dim=-1)
    return x.gather(-1, order) * F.embedding(order[:, 0], w) * w[order[0]]


def _max_pool(x: Tensor, w: Tensor) -> Tensor:
    return F.interpolate(F.max_pool1d(x @ w, 2)[None], WIDTH)[0].cummax(0).values


def _zero_dim(x: Tensor, w: Tensor) -> Tensor:
    return x * (x @ w).mean() * w.sum()


def _zero_size(x: Tensor, w: Tensor) -> Tensor:
    empty = (x * w)[:0]
    return torch.cat([x * w, empty.sin() * empty]) + empty.prod()


def _in_place_activations(x: Tensor, w: Tensor) -> Tensor:
    return F.relu_((x @ w).add_(1.0)) * (x * w).sigmoid_().add(1.0).tanh_()


def _half_precision(x: Tensor, w: Tensor) -> Tensor:
    return ((x.bfloat16() @ w.bfloat16()).sin() * x.half().exp()).float() + (x.double() * w).cos().float()


def _norms(x: Tensor, w: Tensor) -> Tensor:
    h = F.layer_norm(x @ w, (WIDTH,), w[0], w[1])
    return F.batch_norm(F.rms_norm(h, (WIDTH,)), None, None, training=True)


def _sparse_coo(x: Tensor, w: Tensor) -> Tensor:
    mask = (torch.arange(WIDTH * WIDTH).view(WIDTH, WIDTH) % 7 == 0).float()
    return torch.sparse.mm(mask.to_sparse(), x * w) + torch.sparse.mm((x * mask).to_sparse(), w)


def _sparse_csr(x: Tensor, w: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch calls its CSR support beta
        csr = (torch.arange(WIDTH * WIDTH).view(WIDTH, WIDTH) % 5 == 0).float().to_sparse_csr()
        return csr @ (x * w)


def _strided_nested(x: Tensor, w: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch calls nested tensors a prototype
        nested = torch.nested.as_nested_tensor([x[:5] * 2, x[5:] * 3])
    h = torch.nested.to_padded_tensor(F.linear(nested, w) * nested, 0.0)
    return h[1].sum() * x


def _jagged_nested(x: Tensor, w: Tensor) -> Tensor:
    offsets = torch.tensor([0, 5, 6, WIDTH])
    nested = torch.nested.nested_tensor_from_jagged(x @ w, offsets)
    return (nested.sin() * nested * nested.cos()).values()


def _through_other_views(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    diagonal = h.diagonal().exp()
    rolled = h.permute(1, 0).reshape(-1, 8).flip(0).movedim(0, 1)
    return h.as_strided((8, 8), (1, 3), 5).sin().sum() * x + diagonal + rolled.norm() + h.view(torch.int32).sum() * 0.0


PROGRAMS: list[tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = [
    (_mm_with_own_transpose, (W,)),
    (_overlapping_slices, (W,)),
    (_windows, (W,)),
    (_chunked_qkv, ((WIDTH, 3 * WIDTH),)),
    (_interleaved_qkv, ((WIDTH, 3 * WIDTH),)),
    (_chunked_swiglu, ((WIDTH, 2 * WIDTH), W)),
    (_non_contiguous, (W,)),
    (_expanded, (W,)),
    (_complex, (W,)),
    (_conj_view, (W,)),
    (_neg_view, (W,)),
    (_bool_masks, (W,)),
    (_integer_indices, (W,)),
    (_max_pool, (W,)),
    (_zero_dim, (W,)),
    (_zero_size, (W,)),
    (_in_place_activations, (W,)),
    (_half_precision, (W,)),
    (_norms, (W,)),
    (_sparse_coo, (W,)),
    (_sparse_csr, (W,)),
    (_strided_nested, (W,)),
    (_jagged_nested, (W,)),
    (_through_other_views, (W,)),
]


@both_tiers
@pytest.mark.parametrize(("program", "shapes"), PROGRAMS, ids=[fn.__name__.strip("_") for fn, _ in PROGRAMS])
def test_each_program_gives_the_same_bits(program: Callable[..., Tensor], shapes: Any, tier: str) -> None:
    def build() -> nn.Module:
        return Stack([Layer(program, *shapes), Layer(program, *shapes)])

    assert_same_bits(build, train(batch()), steps=2, tier=tier, min_bytes=1)


# --- every kind of tensor, saved by a function of its own ---------------------------------------------------------


class Pair(torch.Tensor):
    """A wrapper subclass over two tensors, the second a scale, that keeps a note too."""

    codes: Tensor
    scale: Tensor
    note: str

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, note: str = "") -> Pair:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)
        made.codes, made.scale, made.note = codes, scale, note
        return made

    def __init__(self, codes: Tensor, scale: Tensor, note: str = "") -> None: ...

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["codes", "scale"], self.note

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], note: str, size: Any, stride: Any) -> Pair:
        return Pair(inner["codes"], inner["scale"], note)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Pair(args[0].codes.detach(), args[0].scale.detach(), args[0].note)
        if func is torch.ops.aten.mul_.Tensor:
            args[0].scale.mul_(args[1])
            return args[0]
        raise NotImplementedError(f"{func} of a Pair")


def _int_codes(x: Tensor) -> Tensor:
    return (x * 30).to(torch.int8)


def _float8(x: Tensor) -> Any:
    from torchao.quantization import Float8Tensor

    return Float8Tensor.from_hp(x)


def _quantized(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is retiring these; they may still be saved
        return torch.quantize_per_tensor(x, 0.1, 3, torch.qint8)


def _csr(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch calls its CSR support beta
        return x.relu().to_sparse_csr()


def _jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(x.clone(), torch.tensor([0, 3, WIDTH]))


def _bytes(x: Tensor) -> Tensor:
    return (x * 1000).to(torch.int32).view(torch.uint8)


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: x.clone(),
    "transposed": lambda x: x.clone().t(),
    "strided": lambda x: x.clone()[1::3, ::2],
    "offset": lambda x: x.clone()[5, 3:],
    "expanded": lambda x: x[:1].clone().expand(7, WIDTH),
    "expanded_from_one": lambda x: x.clone()[3, 4].expand(5, 5),
    "self_overlapping": lambda x: x.clone().flatten().unfold(0, 100, 10),
    "as_strided": lambda x: x.clone().as_strided((3, 4, 2), (2, 5, 1), 7),
    "channels_last": lambda x: x.view(2, 4, 8, 16).to(memory_format=torch.channels_last),
    "complex64": lambda x: torch.complex(x, -x),
    "complex128": lambda x: torch.complex(x.double(), -x.double()),
    "conj": lambda x: torch.complex(x, x + 1).conj(),
    "neg": lambda x: torch.complex(x, x + 1).conj().imag,
    "conj_and_sliced": lambda x: torch.complex(x, x + 1)[2:, ::3].mH,
    "neg_of_conj_transposed": lambda x: torch.complex(x, x + 1).mH.imag[1:],
    "real_view": lambda x: torch.view_as_real(torch.complex(x, x + 1)),
    "bool": lambda x: x > 0,
    "uint8": _bytes,
    "int8": _int_codes,
    "int16": lambda x: (x * 30).to(torch.int16),
    "int32": lambda x: (x * 30).to(torch.int32),
    "int64": lambda x: (x * 30).to(torch.int64),
    "uint16": lambda x: _bytes(x).view(torch.uint16),
    "uint32": lambda x: _bytes(x).view(torch.uint32),
    "uint64": lambda x: _bytes(x).view(torch.uint64),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float8_e4m3fn": lambda x: x.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda x: x.to(torch.float8_e5m2),
    "float8_e4m3fnuz": lambda x: x.to(torch.float8_e4m3fnuz),
    "float8_e5m2fnuz": lambda x: x.to(torch.float8_e5m2fnuz),
    "float8_e8m0fnu": lambda x: _bytes(x).view(torch.float8_e8m0fnu),
    "float4_e2m1fn_x2": lambda x: _bytes(x).view(torch.float4_e2m1fn_x2),
    "float8_transposed": lambda x: x.to(torch.float8_e4m3fn).t()[3:],
    "nan_inf_negative_zero": lambda x: torch.stack([x / 0.0, x * -0.0, x * float("nan")]),
    "one_buffer_many_dtypes": lambda x: _bytes(x)[:, 64:].view(torch.bfloat16),
    "wrapper": lambda x: Pair(_int_codes(x), x[:, :1].clone(), "note"),
    "wrapper_of_views": lambda x: Pair(_int_codes(x).t(), x.clone()[:, 1]),
    "wrapper_of_a_wrapper": lambda x: Pair(Pair(_int_codes(x), x.clone()), x.clone()),  # type: ignore[arg-type]
    "torchao_float8": _float8,
    "jagged": _jagged,
}
STAYING: dict[str, Callable[[Tensor], Any]] = {
    "zero_dim_of_its_own": lambda x: x.sum(),
    "zero_size": lambda x: x.new_empty(0, 3),
    "sparse_coo": lambda x: x.relu().to_sparse(),
    "sparse_csr": _csr,
    "quantized": _quantized,
    "meta": lambda x: x.to("meta"),
}


def _saving(kind: Callable[[Tensor], Any], log: list[Any]) -> Callable[[], nn.Module]:
    def fn(x: Tensor) -> Tensor:
        return Save.apply(x, log, kind(x.detach()))

    return lambda: Stack([Layer(fn), Layer(fn)])


def _logging(log: list[Any]) -> Callable[[Any], list[Any]]:
    def run(model: nn.Module) -> list[Any]:
        log.clear()
        returned = train(batch())(model)
        return [*returned, *log]

    return run


@both_tiers
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_kind_of_tensor_is_moved_and_comes_back_bit_for_bit(kind: str, tier: str) -> None:
    log: list[Any] = []
    assert_same_bits(_saving(KINDS[kind], log), _logging(log), steps=2, tier=tier)


@pytest.mark.parametrize("kind", STAYING, ids=str)
def test_each_kind_that_cannot_move_stays_bit_for_bit(kind: str) -> None:
    log: list[Any] = []
    if kind == "meta":
        with offloaded([mlp_layer()]) as offloader, offloader.section("code"):
            x = batch()
            Save.apply(x, log, x.detach().to("meta"))
            assert offloader.stats().bytes_out == 0
        return
    assert_same_bits(_saving(STAYING[kind], log), _logging(log), steps=2, moves=False)


def test_a_zero_dim_view_of_a_large_allocation_goes_with_it() -> None:
    log: list[Any] = []
    assert_same_bits(_saving(lambda x: x.clone()[3, 4], log), _logging(log))


def test_views_of_one_allocation_saved_together_come_back_as_they_were() -> None:
    log: list[Any] = []

    def fn(x: Tensor) -> Tensor:
        data = x.detach().clone()
        z = torch.view_as_complex(data.view(WIDTH, -1, 2))
        views = [data, data.t(), data[3:9, ::2], z.conj(), z.mH.imag, data.view(torch.float8_e4m3fn), data[0, 0]]
        return Save.apply(x, log, *views)

    assert_same_bits(lambda: Stack([Layer(fn), Layer(fn)]), _logging(log))


def test_reloaded_tensors_keep_their_address_modulo_sixty_four() -> None:
    """Kernels choose their code path by alignment: the same path must be chosen."""
    seen: list[int] = []

    class Aligned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *saved: Tensor) -> Tensor:
            ctx.save_for_backward(*saved)
            seen.extend(s.data_ptr() for s in saved)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            seen.extend(s.data_ptr() for s in ctx.saved_tensors)
            return (grad, None, None, None)

    def fn(x: Tensor) -> Tensor:
        data = x.detach().clone()
        return Aligned.apply(x, data.flatten()[1:], data.flatten()[17:100], data)

    layer = Layer(fn)
    with offloaded([mlp_layer()]) as offloader:
        with offloader.section("aligned"):
            out = layer(batch())
        out.sum().backward()
        del out
        assert offloader.stats().bytes_in > 0
    before, after = seen[:3], seen[3:]
    assert [a % 64 for a in before] == [a % 64 for a in after]


# --- DTensor ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_a_dtensor_is_moved_and_comes_back_bit_for_bit(mesh: Any) -> None:
    log: list[Any] = []

    def run(model: nn.Module) -> list[Any]:
        log.clear()
        x = distribute_tensor(batch().detach(), mesh, [Shard(0)]).requires_grad_()
        out = model(x)
        loss = out.square().sum().full_tensor()
        loss.backward()
        grad = x.grad
        assert isinstance(out, DTensor) and isinstance(grad, DTensor)
        return [loss.detach(), grad.to_local()]

    def fn(x: DTensor, w: Tensor) -> Any:
        return (x * x).sin() @ distribute_tensor(w.detach(), mesh, [Shard(1)])

    assert_same_bits(lambda: Stack([Layer(fn, W), Layer(fn, W)]), run, steps=2, watch_storages=False)


# --- what belongs to modules --------------------------------------------------------------------------------------


class Owner(nn.Module):
    """Saves nothing but what belongs to it."""

    def __init__(self, save: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(W))
        self.register_buffer("table", torch.randn(W))
        self.save = save

    def forward(self, x: Tensor) -> Tensor:
        weight, table = self.weight, self.table
        assert isinstance(table, Tensor)
        views = (weight.t(), weight[2:], weight.detach(), weight.data.view(-1), table.t(), table[1], weight.view(-1, 2))
        return self.save(x, weight, table, *views)


def test_parameters_buffers_and_their_views_are_never_moved() -> None:
    log: list[Any] = []

    def save(x: Tensor, *tensors: Tensor) -> Tensor:
        return Save.apply(x, log, *tensors)

    stats = assert_same_bits(lambda: Stack([Owner(save), Owner(save)]), _logging(log), moves=False)
    # Each byte that stayed is counted once, however many views saved it.
    assert stats[-1].kept_bytes == 2 * 2 * WIDTH * WIDTH * 4


def test_parameters_are_saved_as_the_very_memory_of_the_parameter() -> None:
    layer = mlp_layer()
    pointers: list[int] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight.t())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            pointers.append(ctx.saved_tensors[0].data_ptr())
            return grad, None

    with offloaded([layer]) as offloader, offloader.section("look"):
        out = Look.apply(batch(), layer.weights[0])
        out.sum().backward()
        del out
    assert pointers == [layer.weights[0].data_ptr()]


def test_what_autocast_makes_of_a_parameter_is_never_moved() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return train(batch())(model)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x + 1.0, w)  # autocast itself holds what it made of a leaf

    stats = assert_same_bits(lambda: Stack([Layer(fn, W)]), run)
    # Of bf16 input and bf16 weight, the input alone moves.
    assert [s.bytes_out for s in stats] == [WIDTH * WIDTH * 2] * 3


@both_tiers
def test_a_stack_under_autocast_gives_the_same_bits(tier: str) -> None:
    def run(model: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return train(batch())(model)

    assert_same_bits(mlp_stack, run, tier=tier)


def test_an_optimizer_step_between_steps_is_seen() -> None:
    """Parameters change in place between steps: nothing of an earlier step may be taken for what is saved now."""

    def run(model: nn.Module) -> list[Tensor]:
        returned = train(batch())(model)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=1e-2)
        return [*returned, *[p.detach().clone() for p in model.parameters()]]

    assert_same_bits(mlp_stack, run)


# --- modules within modules ---------------------------------------------------------------------------------------


def test_nested_modules_give_the_same_bits() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(mlp_layer(), nn.Sequential(nn.LayerNorm(WIDTH), mlp_layer()))
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inner(x) + x).sin()

    assert_same_bits(lambda: Stack([Outer(), Outer()]), train(batch()))


def test_sections_within_sections_give_the_same_bits() -> None:
    outer = Stack([Stack([mlp_layer(), mlp_layer()]), mlp_layer()])
    expected = _result(outer)
    with offloaded([outer.layers[0], outer.layers[0].layers[0], outer.layers[0].layers[1], outer]) as offloader:
        assert _result(outer) == expected
        assert offloader.stats().bytes_out > 0


def _result(model: nn.Module) -> list[Any]:
    model.zero_grad()
    x = batch()
    loss = model(x).sum()
    loss.backward()
    return [bits(loss), bits(x.grad), *[bits(p.grad) for p in model.parameters()]]


def test_a_module_that_stands_twice_in_the_list_gives_the_same_bits() -> None:
    def build() -> nn.Module:
        shared = mlp_layer()
        return Stack([shared, mlp_layer(), shared])

    assert_same_bits(build, train(batch()))


def test_a_module_called_twice_in_one_forward_gives_the_same_bits() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(layer(x)) * layer(x)
            return x

    assert_same_bits(lambda: Twice([mlp_layer(), mlp_layer()]), train(batch()))


def test_weights_shared_between_modules_give_the_same_bits() -> None:
    def build() -> nn.Module:
        stack = mlp_stack(3)
        stack.layers[2].weights[0] = stack.layers[0].weights[0]
        return stack

    assert_same_bits(build, train(batch()))


def test_a_whole_model_with_its_gaps_gives_the_same_bits() -> None:
    """What a model saves between its layers belongs to the offloader too."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([mlp_layer() for _ in range(3)])
            self.head = nn.Linear(WIDTH, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.sin() * x
            for block in self.blocks:
                x = (block(x) * x).tanh()
            return self.head(x.exp()).log_softmax(-1)

    torch.manual_seed(0)
    model = Model()
    expected = _result(model)
    for tier in ("disk", "host"):
        with offloaded(model, tier=tier) as offloader:
            for _ in range(3):
                assert _result(model) == expected
                assert_nothing_left(offloader)
            report = offloader.report()
    assert report.stats.num_sections == 3
    gaps = [s for s in report.sections if s.name.startswith("Model, ") and s.bytes_out > 0]
    assert [s.name for s in gaps] == [
        "Model, before blocks.0",
        "Model, after blocks.0",
        "Model, after blocks.1",
    ]


def test_code_in_a_section_of_its_own_gives_the_same_bits() -> None:
    layer = mlp_layer()
    expected = _result(layer)
    with offloaded([mlp_layer()]) as offloader:

        class Code(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with offloader.section("code"):
                    return layer(x)

        code = Code()
        code.layer = layer
        assert _result(code) == expected
        assert offloader.stats().bytes_out > 0
        assert [s.name for s in offloader.report().sections] == ["code"]


def test_recurrent_and_convolutional_modules_give_the_same_bits() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(WIDTH, WIDTH)
            conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
            self.conv = nn.Sequential(conv, nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.rnn(x)[0].t()[None])[0].t()

    assert_same_bits(lambda: Stack([Mixed(), Mixed()]), train(batch()))


def test_the_options_of_anomaly_detection_and_deterministic_algorithms_do_not_matter() -> None:
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # anomaly mode warns that it is on
            stack.enter_context(torch.autograd.detect_anomaly(check_nan=False))
        torch.use_deterministic_algorithms(True)
        stack.callback(torch.use_deterministic_algorithms, False)
        assert_same_bits(mlp_stack, train(batch()))


def test_lanes_that_lag_give_the_same_bits() -> None:
    """Law 6 on the way: a use waits for its bytes, however late the copies are."""
    import time

    from lighterage.engine.offloader import Offloader

    torch.manual_seed(0)
    model = mlp_stack(3)
    expected = _result(model)
    policy = lighterage.Policy(min_bytes=64, keep_last=0, release_after=0, prefetch_ahead=0)
    with Offloader(list(model.layers), policy, before_copies=lambda: time.sleep(0.004)) as offloader:
        for _ in range(3):
            assert _result(model) == expected
            assert_nothing_left(offloader)
        assert offloader.stats(total=True).late_reloads > 0
