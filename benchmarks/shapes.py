"""The shapes that benchmarks use, named after the models they come from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A stack of equal decoder layers and what goes through it."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    seq: int
    batch: int = 1


LLAMA_8B_X8 = DecoderShape(
    name="8 layers of Llama 8B", layers=8, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, seq=8192
)
"""The layer of Llama 3 8B (H 4096, F 14336, 32 heads, 8 key and value heads), eight of its 32 layers."""

HOST_BOUND = DecoderShape(
    name="8 narrow layers", layers=8, hidden=512, ffn=1792, heads=4, kv_heads=1, head_dim=128, seq=128
)
"""The same layer, so narrow that an accelerator waits for the host: what the host adds is then what is seen."""

TINY = DecoderShape(
    name="4 tiny layers", layers=4, hidden=64, ffn=192, heads=4, kv_heads=2, head_dim=16, seq=256, batch=2
)
"""For a smoke test on a CPU: no figure taken with it means anything."""
