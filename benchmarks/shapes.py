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

NARROW_DECODER = DecoderShape(
    name="16 narrow layers", layers=16, hidden=1024, ffn=3584, heads=8, kv_heads=2, head_dim=128, seq=512
)
"""The same layer at a quarter of the width and a short sequence: its kernels leave multiprocessors free."""

TINY = DecoderShape(
    name="4 tiny layers", layers=4, hidden=64, ffn=192, heads=4, kv_heads=2, head_dim=16, seq=256, batch=2
)
"""For a smoke test on a CPU: no figure taken with it means anything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """A stack of mixture-of-experts layers, grouped SwiGLU MLPs, and the rows that reach the experts of one device."""

    name: str
    hidden: int
    ffn: int
    """Of one expert; the first product has twice as many outputs, gate and up."""
    experts: int
    """On this device."""
    layers: int
    rows: int = 32768
    """Copies of tokens, of all experts of this device together."""

    @property
    def splits(self) -> list[int]:
        """The same number of rows for every expert."""
        return [self.rows // self.experts] * self.experts


STACK_8 = ExpertsShape(name="stack of 8 experts", hidden=4096, ffn=2048, experts=8, layers=6)
"""6 grouped MLPs over 32768 rows, with few experts."""

STACK_64 = ExpertsShape(name="stack of 64 experts", hidden=4096, ffn=2048, experts=64, layers=6)
"""The same with many."""

MIXTRAL_8X7B = ExpertsShape(name="Mixtral 8x7B", hidden=4096, ffn=14336, experts=8, layers=32)
"""H 4096, F 14336, 8 experts, of which a token takes 2: the rows of 16384 tokens."""

QWEN3_30B_A3B = ExpertsShape(name="Qwen3 30B A3B", hidden=2048, ffn=768, experts=128, layers=48)
"""H 2048, F 768, 128 experts, of which a token takes 8: the rows of 4096 tokens."""

DEEPSEEK_V3_EP8 = ExpertsShape(name="DeepSeek V3, 32 local experts", hidden=7168, ffn=2048, experts=32, layers=58)
"""H 7168, F 2048, 256 routed experts over 8 devices, of which a token takes 8: the rows of 4096 tokens a device."""

EXPERTS = (STACK_64, STACK_8, MIXTRAL_8X7B, QWEN3_30B_A3B, DEEPSEEK_V3_EP8)

NARROW_MOE = ExpertsShape(name="4 narrow blocks of 8 experts", hidden=1024, ffn=2048, experts=8, layers=4, rows=1024)
"""H 1024, 8 experts, of which a token takes 2: the rows of 512 tokens. An accelerator waits for the host there."""
