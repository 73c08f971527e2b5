"""The calls to `torch.cuda` that graphs need, apart from the rest: without a GPU, tests put something else here."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_failed: list[Any] = []  # graphs whose capture failed: see `Cuda._clean_up`


class Cuda:
    """One model's graphs: captures, replays, and the memory that these have.

    All graphs share one memory pool: each overwrites what the others left. That is safe in any order, one at a
    time, because a graph reads only its inputs, the weights and what the same replay wrote, and its outputs are
    copied before the next one starts.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._pools: dict[Any, Any] = {}  # of each graph; more than one pool only after a capture that failed
        self._done: torch.cuda.Event | None = None

    def holds(self, t: Tensor) -> bool:
        """Whether a graph reads such a tensor where it is; all others are values to it."""
        return t.is_cuda

    def capturing(self) -> bool:
        """Whether somebody is capturing on the stream that is the current one."""
        return torch.cuda.is_current_stream_capturing()

    def drawn(self, device: torch.device) -> int:
        """How far the device's default generator has got: kept on the CPU, so this doesn't wait."""
        return torch.cuda.default_generators[device.index].get_offset()

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """One graph at a time: on whichever stream this is, after the work of the turn before."""
        with torch.cuda.device(device):
            if self._done is not None:
                self._done.wait()
            yield
            self._done = torch.cuda.Event()
            self._done.record()

    def capture(self, device: torch.device, run: Callable[[], Any]) -> tuple[Any, Any]:
        """(graph, what `run` returned: tensors that each replay fills). `run` is called once, and computes nothing."""
        graph, began, failure = torch.cuda.CUDAGraph(), False, None
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        collecting = gc.isenabled()
        gc.disable()  # a cycle collected halfway might free a graph or an event, which breaks the capture
        try:
            # A capture that ends badly leaves its stream the current one; the outer context puts that right.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                began = True
                try:
                    result = run()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            self._clean_up(device, graph, began)
            if failure is not None and failure is not error:  # ending a broken capture is an error that says less
                raise failure from None
            raise
        finally:
            failure = None  # its traceback holds this frame, and with it what the forward had allocated
            if collecting:
                gc.enable()
        self._pools[graph] = self._pool
        return graph, result

    def _clean_up(self, device: torch.device, graph: Any, began: bool) -> None:
        """Undo what PyTorch leaves behind of a failed capture.

        Up to torch 2.11 `capture_end` raises before it tells the allocators and the generator (pytorch#180395 and
        #171263). From then on the allocator for the device refuses to free cached memory, and the generator to draw;
        a small capture that succeeds puts the generator right. The allocator for pinned memory can't be told from
        here: it refuses the same pool a second time, and keeps asking the graph, which therefore stays.
        """
        _failed.append(graph)
        try:
            graph.pool()  # raises unless the capture itself ended well
        except RuntimeError:
            with contextlib.suppress(RuntimeError):  # raised where the allocator was told, or never heard of it
                torch._C._cuda_endAllocateToPool(device.index, self._pool)
                began = True
            if began:  # the beginning of a capture takes a share in its pool, which only an ended one gives back
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_releasePool(device.index, self._pool)
        graph.reset()
        self._stream = self._pool = None
        with torch.cuda.device(device):
            scratch, small = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
            with torch.cuda.graph(small, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                scratch.zero_()
            small.reset()

    def replay(self, graph: Any) -> None:
        graph.replay()

    def drop(self, graph: Any) -> None:
        graph.reset()
        del self._pools[graph]
        if self._pool not in self._pools.values():  # the allocator takes no graphs into a pool that had its last one
            self._pool = None

    def wait(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def give_back(self) -> None:
        torch.cuda.empty_cache()

    def pool_bytes(self) -> int:
        """Bytes that the pool keeps from everybody else."""
        pools = set(self._pools.values())
        segments = torch.cuda.memory_snapshot() if pools else []
        return sum(segment["total_size"] for segment in segments if segment["segment_pool_id"] in pools)
