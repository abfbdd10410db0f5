"""Attention as a module, bare and with its products.

Shape suffixes: B sequences, S tokens of each, D model width, N query heads, G heads of keys and values, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

from lighterage.formats.arguments import check_count
from lighterage.formats.quantizer import Quantizer
from lighterage.formats.tensor_arguments import check_tensor
from lighterage.nn.linear import Linear
from lighterage.ops.attention import MarkOutput, attention, check_ends, check_options
from lighterage.ops.packed_attention import checked_bounds
from lighterage.ops.rotary import rotary_table, rotate_heads
from lighterage.recipes import Recipe


class DotProductAttention(nn.Module):
    """softmax(q k^T * scale) v. It has no parameters."""

    def __init__(
        self,
        *,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        output_quantizer: Quantizer | None = None,
        mark_output: MarkOutput = "auto",
    ) -> None:
        """causal, scale, output_quantizer, mark_output: as of `lighterage.ops.attention`.

        dropout: of the weights, in training only.
        Raises: ValueError, TypeError: on a probability that is none, an unknown mark, or no quantizer.
        """
        super().__init__()
        check_options(causal, scale, dropout, mark_output, output_quantizer)
        self.causal = causal
        self.scale = scale
        self.dropout = dropout
        self.output_quantizer = output_quantizer
        self.mark_output: MarkOutput = mark_output

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen: int | None = None,
        max_seqlen_kv: int | None = None,
    ) -> Tensor:
        """(B, S, N, H), or packed (T, N, H) with `cu_seqlens`, to (B, S, N * H) or (T, N * H).

        See `lighterage.ops.attention`.
        """
        return attention(
            q,
            k,
            v,
            causal=self.causal,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            cu_seqlens=cu_seqlens,
            cu_seqlens_kv=cu_seqlens_kv,
            max_seqlen=max_seqlen,
            max_seqlen_kv=max_seqlen_kv,
            output_quantizer=self.output_quantizer,
            mark_output=self.mark_output,
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"causal={self.causal}, dropout={self.dropout}, mark_output={self.mark_output!r}"


class SelfAttention(nn.Module):
    """Queries, keys and values in one product, rotary positions, attention, and the projection of its output.

    Saved are the input's codes, the rotated heads (one allocation), the output and its logarithms. The projection saves
    the output too, instead of codes of its own: attention needs it anyway, so it costs nothing.
    """

    table_bits: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        max_positions: int = 4096,
        rotary_base: float = 10000.0,
        recipe: Recipe | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """num_kv_heads: each shared by num_heads / num_kv_heads query heads; num_heads unless given.

        max_positions: the longest sequence.
        recipe: of both products; attention itself is in the dtype of the parameters.
        Raises: ValueError: if heads do not divide the width, or key heads the query heads.
        """
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, count in (("hidden_size", hidden_size), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            check_count(name, count, least=1)
        if hidden_size % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must divide hidden_size, and num_kv_heads num_heads; got {hidden_size}, {num_heads} and "
                f"{num_kv_heads}."
            )
        self.num_heads, self.num_kv_heads, self.head_width = num_heads, num_kv_heads, hidden_size // num_heads
        self.max_positions, self.rotary_base = max_positions, rotary_base
        num_heads_of_all = num_heads + 2 * num_kv_heads
        self.qkv = Linear(
            hidden_size, num_heads_of_all * self.head_width, bias=False, recipe=recipe, device=device, dtype=dtype
        )
        self.core = DotProductAttention(causal=causal, dropout=dropout)
        self.out = Linear(
            hidden_size, hidden_size, bias=False, recipe=recipe, save_original_input=True, device=device, dtype=dtype
        )
        # As whole numbers, because a model that is cast to another dtype casts its floating buffers too.
        self.register_buffer("table_bits", self._table_bits().to(self.out.weight.device), persistent=False)

    def _table_bits(self) -> Tensor:
        # On the CPU, so that a model has the same table wherever it was made and moved.
        return rotary_table(self.max_positions, self.head_width, base=self.rotary_base, device="cpu").view(torch.int32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty` hands out memory without contents, and no state dict holds the table.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.table_bits.is_meta:
            with torch.no_grad():
                self.table_bits.copy_(self._table_bits())
        return self

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """(B, S, D) to (B, S, D); or (T, D) of packed sequences, which end at `cu_seqlens`, to (T, D).

        Raises: ValueError, TypeError: on another shape; where the host knows, if a sequence is longer than
        `max_positions` or the ends do not rise to the tokens.
        """
        check_tensor("x", x)
        if x.ndim != (3 if cu_seqlens is None else 2):
            layout = "(batch, tokens, width)" if cu_seqlens is None else "(tokens, width) with cu_seqlens"
            raise ValueError(f"x must be {layout}; got {tuple(x.shape)}. Pass cu_seqlens for packed sequences.")
        num_tokens = x.shape[-2]
        if self.table_bits.device != x.device:  # made on "meta", and given parameters by assignment
            self.table_bits = self._table_bits().to(x.device)
        table = self.table_bits.view(torch.float32)
        if cu_seqlens is None:
            self._check_longest(num_tokens)
            table = table[:, :num_tokens]
        else:
            check_ends("cu_seqlens", cu_seqlens)
            if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
                bounds = checked_bounds(cu_seqlens, "x", num_tokens)
                self._check_longest(max(end - start for start, end in pairwise(bounds)))
            ends = cu_seqlens.to(device=x.device, dtype=torch.int64)
            table = table.index_select(1, positions_of(num_tokens, ends))
        heads = self.qkv(x).unflatten(-1, (-1, self.head_width))
        heads = rotate_heads(heads, table, self.num_heads + self.num_kv_heads)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2)
        out: Tensor = self.out(self.core(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen))
        return out

    def _check_longest(self, num_tokens: int) -> None:
        if num_tokens > self.max_positions:
            raise ValueError(
                f"this attention has rotary positions for {self.max_positions} tokens; got {num_tokens}. Make it with "
                f"max_positions={num_tokens}."
            )


def positions_of(num_tokens: int, cu_seqlens: Tensor) -> Tensor:
    """The place of each packed token within its sequence, on the device of `cu_seqlens`; the host does not wait.

    >>> positions_of(5, torch.tensor([0, 2, 2, 5])).tolist()
    [0, 1, 0, 1, 2]
    """
    token = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return token - cu_seqlens[sequence]
