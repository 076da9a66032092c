"""A micro batch's forward and backward pass as CUDA graphs: the GPU starts all their kernels without the host.

A graph repeats the same kernels on the same memory, so all shapes are fixed and nothing between them runs on the host.
Tested on the CPU with a recorder of operators in place of CUDA's; untested on CUDA.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    """Recorded kernels."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Records kernels."""

    def warm_up(self) -> AbstractContextManager[None]:
        """Wrap the runs before recording, in which libraries allocate and tune what they keep."""

    def record(self) -> AbstractContextManager[Graph]:
        """Record the kernels that the block starts instead of running them."""


class CudaRecorder:
    """Records CUDA graphs that share one memory pool, to be replayed in the order of recording."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)

    @contextmanager
    def record(self) -> Iterator[Graph]:
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves its own stream current if the recording fails.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
            yield graph


@dataclass
class Pass:
    """The graphs of a micro batch, and the loss that the first one writes."""

    forward: Graph
    backward: Graph
    loss: Tensor


class CapturedPasses:
    """Replays the passes of a step's micro batches: the first writes the step's gradients, the others add to them.

    Args:
        inputs: the model's arguments, whose tensors become the graphs' inputs.
        forward: computes the loss; backward: adds its gradients.
        several: the step has several micro batches.
    """

    def __init__(
        self,
        inputs: dict[str, Any],
        forward: Callable[[dict[str, Any]], Tensor],
        backward: Callable[[Tensor], None],
        several: bool,
        recorder: Recorder,
    ):
        self._inputs = inputs
        self._passes: list[Pass] = []
        self._next = 0  # micro batch of the step
        for _ in range(2 if several else 1):
            with recorder.record() as forward_graph:
                loss = forward(inputs)
            with recorder.record() as backward_graph:
                backward(loss)
            self._passes.append(Pass(forward_graph, backward_graph, loss.detach()))

    def takes(self, inputs: dict[str, Any]) -> bool:
        """Return True if the graphs compute with these arguments."""
        return inputs.keys() == self._inputs.keys() and all(
            value.shape == self._inputs[name].shape if isinstance(value, Tensor) else value == self._inputs[name]
            for name, value in inputs.items()
        )

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        """Return the loss, which the next micro batch but one overwrites."""
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self._inputs[name].copy_(value, non_blocking=True)
        self._current.forward.replay()
        return self._current.loss

    def backward(self) -> None:
        self._current.backward.replay()
        self._next += 1

    @property
    def _current(self) -> Pass:
        return self._passes[min(self._next, len(self._passes) - 1)]

    def end_step(self) -> None:
        self._next = 0
