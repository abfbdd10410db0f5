"""`DotProductAttention` with Transformer Engine's arguments.

Letters: S tokens, B sequences, T tokens of all, N query heads, G heads of keys and values, H head width.
"""

from __future__ import annotations

import torch
from torch import nn

from lighterage import ops
from lighterage.compat.transformer_engine.checkpoints import accept_extra_state
from lighterage.compat.transformer_engine.honesty import RNG_TRACKER, TENSOR_PARALLEL, refuse

FORMATS = ("sbhd", "bshd", "thd")
_MASKS = {"no_mask": False, "causal": True}
_PACKED_MASKS = {"padding": False, "padding_causal": True}
_FULL_WINDOWS = {False: (None, (-1, -1)), True: (None, (-1, -1), (-1, 0))}
_MASK_REMEDY = "Use attn_mask_type and cu_seqlens, or torch.nn.functional.scaled_dot_product_attention."


class DotProductAttention(nn.Module):
    """softmax(q k^T * scale) v over PyTorch's kernels, in the dtype of its inputs. It has no parameters."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: object = None,
        tp_group: object = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: object = None,
        cp_global_ranks: object = None,
        cp_stream: object = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
    ) -> None:
        """num_attention_heads, num_gqa_groups: N and G; N unless given. kv_channels: H.

        attention_dropout: of the weights, in training only.
        qkv_format: "sbhd" (S, B, N, H), "bshd" (B, S, N, H) or "thd" (T, N, H), packed.
        attn_mask_type: "no_mask" or "causal"; of packed inputs "padding" or "padding_causal".
        layer_number, attention_type: labels, a number from 1 on, and "self" or "cross"; q and k may differ in length
            without a causal mask whatever they say.
        Raises: ValueError: an option that is not here.
        """
        super().__init__()
        widths = (kv_channels, kv_channels) if isinstance(kv_channels, int) else tuple(kv_channels)
        parallel = "There is no context parallelism here: shard sequences around this module."
        refuse(
            "DotProductAttention",
            {
                "kv_channels": (widths[1], widths[0], "Keys and values have the same width."),
                "sequence_parallel": (sequence_parallel, False, TENSOR_PARALLEL),
                "tp_size": (tp_size, 1, TENSOR_PARALLEL),
                "tp_group": (tp_group, None, TENSOR_PARALLEL),
                "cp_group": (cp_group, None, parallel),
                "cp_global_ranks": (cp_global_ranks, None, parallel),
                "cp_stream": (cp_stream, None, parallel),
                "cp_comm_type": (cp_comm_type, "p2p", parallel),
                "softmax_type": (softmax_type, "vanilla", "There is no sink."),
                "return_max_logit": (return_max_logit, False, "PyTorch's kernels do not give it."),
            },
        )
        if attention_dropout:
            refuse("DotProductAttention", {"get_rng_state_tracker": (get_rng_state_tracker, None, RNG_TRACKER)})
        self.num_heads, self.head_width = num_attention_heads, widths[0]
        self.num_kv_heads = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        self.attention_dropout, self.softmax_scale = attention_dropout, softmax_scale
        self.qkv_format, self.attn_mask_type, self.window_size = qkv_format, attn_mask_type, window_size
        if attention_type not in ("self", "cross"):
            raise ValueError(f'attention_type is "self" or "cross"; got {attention_type!r}.')
        if layer_number is not None and (isinstance(layer_number, bool) or not layer_number >= 1):
            raise ValueError(f"layer_number counts layers from 1 on, or is None; got {layer_number!r}.")
        self.layer_number, self.attention_type = layer_number, attention_type
        accept_extra_state(self)
        # A packed layer's mask may be named in forward alone, as their default is a mask of other formats.
        if qkv_format != "thd":
            _causal(qkv_format, attn_mask_type, window_size)

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: object = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool = False,
    ) -> torch.Tensor:
        """q of `qkv_format`, k and v the same with G heads, to (S, B, N * H), (B, S, N * H) or (T, N * H).

        cu_seqlens_q, cu_seqlens_kv: int32 (sequences + 1,), the ends of packed sequences, beginning with 0.
        qkv_format, attn_mask_type, window_size: for this call instead of the layer's.
        fast_zero_fill: either value; no output is filled.
        Raises: ValueError: an option that is not here, or heads other than the layer's.
        """
        padded = "Packed sequences lie next to each other."
        refuse(
            "DotProductAttention.forward",
            {
                "attention_mask": (attention_mask, None, _MASK_REMEDY),
                "cu_seqlens_q_padded": (cu_seqlens_q_padded, None, padded),
                "cu_seqlens_kv_padded": (cu_seqlens_kv_padded, None, padded),
                "checkpoint_core_attention": (checkpoint_core_attention, False, "Use torch.utils.checkpoint."),
                "core_attention_bias_type": (core_attention_bias_type, "no_bias", _MASK_REMEDY),
                "core_attention_bias": (core_attention_bias, None, _MASK_REMEDY),
                "alibi_slopes": (alibi_slopes, None, _MASK_REMEDY),
                "inference_params": (inference_params, None, "There is no cache of keys and values."),
                "pad_between_seqs": (pad_between_seqs or False, False, padded),
                "fp8_output": (fp8_output, False, "The output has the dtype of the inputs."),
            },
        )
        layout = qkv_format or self.qkv_format
        window = self.window_size if window_size is None else window_size
        causal = _causal(layout, attn_mask_type or self.attn_mask_type, window)
        self._check_heads(query_layer, key_layer, value_layer)
        if layout == "thd" and cu_seqlens_q is None:
            raise ValueError("qkv_format='thd' needs cu_seqlens_q, the ends of the packed sequences.")
        if layout != "thd" and (cu_seqlens_q is not None or cu_seqlens_kv is not None):
            raise ValueError(f"cu_seqlens go with qkv_format='thd', packed sequences; the format is {layout!r}.")
        first = layout == "sbhd"
        q, k, v = (t.transpose(0, 1) if first else t for t in (query_layer, key_layer, value_layer))
        out = ops.attention(
            q,
            k,
            v,
            causal=causal,
            scale=self.softmax_scale,
            dropout=self.attention_dropout if self.training else 0.0,
            cu_seqlens=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            max_seqlen=max_seqlen_q if layout == "thd" else None,
            max_seqlen_kv=max_seqlen_kv if layout == "thd" else None,
        )
        return out.transpose(0, 1) if first else out

    def _check_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for name, tensor, heads in (("query", q, self.num_heads), ("key", k, self.num_kv_heads), ("value", v, None)):
            wanted = self.num_kv_heads if heads is None else heads
            if tuple(tensor.shape[-2:]) != (wanted, self.head_width):
                raise ValueError(
                    f"{name}_layer must end in {wanted} heads of {self.head_width}; got {tuple(tensor.shape)}. See "
                    "num_attention_heads, num_gqa_groups and kv_channels."
                )


def _causal(layout: str, mask: str, window: tuple[int, int] | None) -> bool:
    """Whether the mask is causal.

    Raises: ValueError: a format, mask or window that is not here.
    """
    if layout not in FORMATS:
        raise ValueError(f"qkv_format is one of {list(FORMATS)}; got {layout!r}.")
    masks = _PACKED_MASKS if layout == "thd" else _MASKS
    if mask not in masks:
        raise ValueError(
            f"attn_mask_type of qkv_format={layout!r} is one of {list(masks)}; got {mask!r}. Sequences of different "
            "lengths go packed, as 'thd' with cu_seqlens."
        )
    if window not in _FULL_WINDOWS[masks[mask]]:
        raise ValueError(f"there is no sliding window here; got window_size={window}. Leave it out.")
    return masks[mask]
