"""Marks on the opt-out and on the opt-in path, and what chooses between the two."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lighterage.compat.transformer_engine as te
from tests.compat.stacks import DEVICE, NUM_LAYERS, Runner, assert_nothing_left, batch, get_context, make_layers
from tests.compat.test_offload_context import Watched

both_paths = pytest.mark.parametrize("code_path", ["v1", "v2"])


class Marking(nn.Module):
    """Saves four tensors of one size: unmarked, to move, to stay, and both."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        plain = (x * self.weight).exp()
        moving, staying, both = (plain * i for i in (0.5, 0.25, 0.125))
        moving, staying, both = moving.exp(), staying.exp(), both.exp()
        te.mark_activation_offload(moving, None, both[..., 1:])
        te.mark_not_offload(staying.transpose(0, 1), None)
        te.mark_not_offload(both)
        return plain.sin() + moving.sin() + staying.sin() + both.sin()


def _run(**options) -> tuple[float, Tensor]:
    """How many tensors' bytes the first layer moved, and the gradient of the input."""
    context, sync = get_context(num_layers=1, model_layers=3, **options)
    layers = [Marking() for _ in range(3)]
    x = batch(1)
    Runner(context, sync).forward(layers, x).sum().backward()
    moved = context.offloader.stats().bytes_out
    assert "mark_not_offload" in str(context.offloader.report())
    assert_nothing_left(context)
    return moved / x.nbytes, x.grad


def test_the_opt_out_path_moves_all_but_what_is_marked_not_to():
    moved, _ = _run(code_path="v2")
    assert moved > 2  # the marked one, the unmarked one, and what the products saved


def test_the_opt_in_path_moves_what_is_marked_alone():
    moved, _ = _run(code_path="v1")
    assert moved == 1


def test_both_paths_give_the_bits_of_no_offload():
    x = batch(1)
    h = x
    for layer in [Marking() for _ in range(3)]:
        h = layer(h)
    h.sum().backward()
    for code_path in ("v1", "v2"):
        assert torch.equal(_run(code_path=code_path)[1], x.grad)


@pytest.mark.parametrize(("value", "moved_alone"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_variable_chooses_the_path(value, moved_alone, monkeypatch):
    if value is not None:
        monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", value)
    assert (_run()[0] == 1) == moved_alone


def test_the_argument_wins_over_the_environment_variable(monkeypatch):
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
    assert _run(code_path="v2")[0] > 2
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "0")
    assert _run(code_path="v1")[0] == 1


@both_paths
def test_a_mark_changes_no_other_context(code_path):
    """What a context does follows from its own arguments: two paths live side by side."""
    other = get_context(code_path="v2" if code_path == "v1" else "v1")[0]
    assert (_run(code_path=code_path)[0] == 1) == (code_path == "v1")
    other.close()


@both_paths
def test_marked_not_to_move_memory_stays_and_the_rest_is_freed(code_path):
    context, sync = get_context(code_path=code_path, num_layers=NUM_LAYERS - 2)
    layers = [Watched(layer) for layer in make_layers()]

    def run(index: int, h: Tensor) -> Tensor:
        hidden = layers[index].layer(h).exp()
        layers[index].saved.append(torch.multiprocessing.reductions.StorageWeakRef(hidden.untyped_storage()))
        te.mark_activation_offload(hidden)
        if index == 1:
            te.mark_not_offload(hidden)
        return hidden.sin()

    h = batch(1)
    runner = Runner(context, sync)
    for index in range(NUM_LAYERS):
        h = runner.run(lambda h, index=index: run(index, h), h)
    on_device = [layer.num_on_device for layer in layers]
    assert on_device[:4] == [0, 1, 0, 0]
    h.sum().backward()


@both_paths
def test_the_opt_in_path_may_offload_every_layer(code_path, recwarn):
    context, sync = get_context(code_path=code_path, num_layers=NUM_LAYERS, model_layers=NUM_LAYERS)
    layers = [Marking() for _ in range(NUM_LAYERS)]
    plain = copy.deepcopy(layers)
    x, y = batch(1), batch(1)
    Runner(context, sync).forward(layers, x).sum().backward()
    Runner().forward(plain, y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert context.offloader.stats().bytes_out > 0


@both_paths
@pytest.mark.parametrize("offload_base_tensor", [False, True])
def test_start_offload_accepts_what_theirs_accepts_and_changes_nothing(code_path, offload_base_tensor):
    context, _ = get_context(code_path=code_path)
    qkv = torch.randn(8, 3, 64, device=DEVICE, requires_grad=True)
    with context:
        q, k, v = (qkv * 1).unbind(1)
        te.start_offload(q, k, None, v, offload_base_tensor=offload_base_tensor)
        te.mark_activation_offload(q)
        out = q.sigmoid() * k * v
    out.sum().backward()
    assert qkv.grad is not None and context.offloader.stats().bytes_out > 0


@pytest.mark.parametrize("function", [te.mark_not_offload, te.mark_activation_offload, te.start_offload])
def test_what_is_no_tensor_is_an_error(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}.*argument 1"):
        function(torch.ones(2), [torch.ones(2)])


def test_start_offload_refuses_a_tensor_for_its_flag():
    with pytest.raises(TypeError, match="offload_base_tensor"):
        te.start_offload(torch.ones(2), offload_base_tensor=torch.ones(2))


def test_a_group_of_quantized_tensors_is_marked_by_its_buffers():
    from lighterage.marks import Mark, mark_of

    x = torch.randn(64, 64, dtype=torch.bfloat16)
    tensors, buffers = te.split_quantize(x, [32, 32], [te.Float8BlockQuantizer()] * 2)
    te.mark_not_offload(tensors)
    assert [mark_of(buffer.untyped_storage()._cdata) for buffer in buffers] == [Mark.NOT_OFFLOAD] * 2
    te.mark_activation_offload(tensors[0])
    assert mark_of(buffers[0].untyped_storage()._cdata) is Mark.NOT_OFFLOAD
