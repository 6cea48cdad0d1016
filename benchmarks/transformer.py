"""A plain decoder, in the shapes of today's language models: what the module benchmarks load weights into."""

from __future__ import annotations

import torch
from torch import nn

WIDTH, HIDDEN, VOCABULARY = 2048, 5632, 32_000


class Layer(nn.Module):
    """Attention's four matrices and a gated feed-forward network's three."""

    def __init__(self) -> None:
        """Make the parameters."""
        super().__init__()
        self.norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)


class Transformer(nn.Module):
    """Its weights, in bfloat16; nobody runs it. With 9 layers 1.19 GB."""

    def __init__(self, layers: int, device: str = "cpu") -> None:
        """Make the parameters on a device, their memory touched."""
        super().__init__()
        with torch.device("meta"):
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.bfloat16()
        if device != "meta":
            self.to_empty(device=device)
            for parameter in self.parameters():
                parameter.data.zero_()  # touches the memory, which the system hands out late


def parallelize(module: Transformer) -> None:
    """Cut attention and feed-forward over all ranks, as tensor-parallel models are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    columns, rows = ("q", "k", "v", "gate", "up"), ("out", "down")
    plan = {**{name: ColwiseParallel() for name in columns}, **{name: RowwiseParallel() for name in rows}}
    for layer in module.layers:
        parallelize_module(layer, mesh, plan)
