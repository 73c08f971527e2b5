"""CUDA-graph replay of a whole transformer forward, for any host.

A replay launches what a capture recorded: the same kernels on the same addresses. So it is right only while all that
the forward's Python code looked at is as it was. Here that is the call's key (forms of tensors, values of everything
else, PyTorch's settings, the functions that the forward may call: `key`) and a watch over the model (weights, hooks,
modes, LoRA scales: `watch`). Whatever they can't cover runs the forward itself, for a reason that is a sentence. Each
graph is compared with the forward, bit for bit, before a result of it is handed out (`replay`). `cuda` has the calls
to `torch.cuda`.
"""

from bitfuse.run.graphs.replay import FIRST, Counts, GraphedForward, graph_forward
from bitfuse.run.twin import flat, stand_in

__all__ = ["FIRST", "Counts", "GraphedForward", "flat", "graph_forward", "stand_in"]
