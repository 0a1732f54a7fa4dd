"""A budget in seconds: this machine's products, measured once at a grid of widths and remembered on disk.

Time is a staircase in width: kernels work in tiles, so that some widths cost as much as wider ones. The grid is made of
multiples of what widths are rounded to, so that a plan meets the steps where they were measured. Each product runs as
the passes of `shrink` would leave it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ecospa_fx.budget.cost import GraphCost
from ecospa_fx.budget.graph_cost import Blank, NarrowedOps, Operation, flops
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.ir.build import evaluate
from ecospa_fx.ir.passes import run_passes
from ecospa_fx.ir.schema import call_arguments
from ecospa_fx.passes import CLEANUP

INTERVALS = 32
"""Steps of the grid of a call that one coupling narrows; of one that several narrow, this many combinations."""

ALIGNED = 8
"""Wide grids are multiples of this where widths are not rounded: kernels like such widths best."""

ROUNDS, ENOUGH, MOST = 7, 2e-3, 50
"""The least of so many measurements counts; each repeats a call for so many seconds, or so many times."""

FORMAT = "ecospa-fx-latency"
VERSION = 1


class Latency(GraphCost):
    """Seconds of the products that couplings narrow, at the shapes of the example call.

    device: where they are measured; round_to: what widths are a multiple of; cache: folder or None for
    ``$ECOSPA_FX_CACHE``, by default ``~/.cache/ecospa_fx``. Measured seconds are kept there, one file per device, torch
    version and number of threads; a file that cannot be read is measured anew.

    >>> plan(couplings, 0.3, scores, round_to=8, budget=Latency.of(couplings, 8, cache="here"))  # doctest: +SKIP
    """

    unit = "the measured time of the products that the couplings narrow"

    def __init__(
        self,
        narrowed: NarrowedOps,
        device: torch.device,
        round_to: int = 1,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(narrowed)
        self.device, self.round_to = device, round_to
        self.table = LatencyTable(device, cache)

    @classmethod
    def of(cls, couplings: Couplings, round_to: int = 1, cache: str | os.PathLike[str] | None = None) -> Latency:
        """On the device of the couplings' model. Raises PlanError where it has none, or where there is no graph."""
        narrowed = NarrowedOps.of(couplings, "latency")
        device = next((p.device for p in couplings.model.parameters()), torch.device("cpu"))
        if device.type == "meta":
            raise PlanError("the model is on meta, where nothing takes time: load it, or use budget='flops'")
        return cls(narrowed, device, round_to, cache)

    def grid(self, size: int, couplings: int) -> list[int]:
        step = math.ceil(size / max(2, round(INTERVALS ** (1 / max(couplings, 1)))))
        unit = self.round_to if self.round_to > 1 else ALIGNED if step > ALIGNED // 2 else 1
        step = unit * 2 ** max(math.ceil(math.log2(step / unit)), 0)  # grids of other sizes meet this one
        least = unit if unit < size else 1
        return sorted({least, *range(step, size, step), size})

    def prices(self, operations: Sequence[Operation]) -> list[float]:
        products = [operation for operation in operations if flops(operation)]
        seconds = self.table.seconds(products)
        return [seconds.get(operation, 0.0) for operation in operations]


class LatencyTable:
    """Measured seconds of operations on one device, on disk."""

    def __init__(self, device: torch.device, cache: str | os.PathLike[str] | None = None) -> None:
        self.device = device
        self.environment = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "machine": f"{device.type} {platform.machine()} {platform.node()}",
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        }
        environment = json.dumps(self.environment, sort_keys=True)
        folder = Path(cache or os.environ.get("ECOSPA_FX_CACHE") or Path.home() / ".cache" / "ecospa_fx")
        self.path = folder / f"latency-{hashlib.sha256(environment.encode()).hexdigest()[:16]}.json"
        self._seconds = self._read()

    def seconds(self, operations: Sequence[Operation]) -> dict[Operation, float]:
        """What each operation takes; what is not in the table yet is measured and written down."""
        missing = {str(operation): operation for operation in operations if str(operation) not in self._seconds}
        if missing:
            seconds = measured(list(missing.values()), self.device)
            self._seconds = {**self._read(), **self._seconds, **dict(zip(missing, seconds, strict=True))}
            self._write()
        return {operation: self._seconds[str(operation)] for operation in operations}

    def _read(self) -> dict[str, float]:
        """What the file holds; nothing where it is not there, damaged or another machine's."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            return {}
        seconds = data.get("seconds")
        if data.get("environment") != self.environment or not isinstance(seconds, Mapping):
            return {}
        sound = all(isinstance(value, float) and 0 < value < math.inf for value in seconds.values())
        return dict(seconds) if sound else {}

    def _write(self) -> None:
        """Complete or not at all. Raises PlanError where the folder cannot be written."""
        data = {"format": FORMAT, "version": VERSION, "environment": self.environment, "seconds": self._seconds}
        draft = self.path.with_suffix(f".{os.getpid()}.draft")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(data, indent=1), encoding="utf-8")
            draft.replace(self.path)
        except OSError as error:
            raise PlanError(
                f"measured latencies cannot be kept in {self.path.parent}: {error}; set ECOSPA_FX_CACHE to a folder "
                "that can be written"
            ) from error


def measured(operations: Sequence[Operation], device: torch.device) -> list[float]:
    """Seconds of each operation: the least of several rounds, in which all take turns."""
    best, calls = [math.inf] * len(operations), [as_shrunk(operation, device) for operation in operations]
    with torch.no_grad():
        for _ in range(ROUNDS):
            for i, (operation, call) in enumerate(zip(operations, calls, strict=True)):
                best[i] = min(best[i], _once(call, operation.filled(device), device))
    return best


def as_shrunk(operation: Operation, device: torch.device) -> fx.GraphModule:
    """A graph of one call as `shrink` would leave it, cleaned up; its inputs are the tensors among the arguments."""

    graph = fx.Graph()
    with FakeTensorMode():
        tensors = enumerate(operation.filled(device))

        def placed(value: object) -> object:
            """An argument with a placeholder for each tensor."""
            if isinstance(value, tuple):
                return [placed(item) for item in value]
            if not isinstance(value, Blank):
                return value
            number, tensor = next(tensors)
            node = graph.placeholder(f"operand_{number}")
            node.meta["val"] = tensor
            return node

        args, kwargs = call_arguments(operation.operator, {name: placed(value) for name, value in operation.arguments})
        node = graph.call_function(operation.operator, args, kwargs)
        node.meta["val"] = evaluate(node)
    graph.output(node)
    return run_passes(fx.GraphModule(torch.nn.Module(), graph), CLEANUP).graph_module


def _once(call: fx.GraphModule, tensors: Sequence[Tensor], device: torch.device) -> float:
    """Seconds per call, over as many calls as can be timed."""

    def run(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            call(*tensors)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - begin) / times

    run(1)
    return run(min(max(math.ceil(ENOUGH / max(run(1), 1e-9)), 1), MOST))
