"""Sparse training on many architectures: three steps with two shrinks, then compared with masking in float64.

    python benchmarks/train_zoo.py ZOO [NAME ...]

On the 85 architectures of our zoo: 85 exact; one of them (DETR) asks for finite values by its own code in training
mode, so it is traced in eval mode and trained without dropout, with a warning.

ZOO is a folder with factories.py, whose ``F`` maps names to functions that return (model, args, kwargs). Trained by
AdamW on the mean square of all outputs; in float32, to 2e-5, where the model itself cannot do float64. The weights
that are left are put into the dense model, zeros elsewhere: in eval mode both must compute the same, to 1e-9. Prints
one line per model and exits with 1 where one fails.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ecospa_fx as eco
from ecospa_fx.errors import EcospaError
from ecospa_fx.verify import masked_error

STEPS = 3


class Warnings(logging.Handler):
    """Keeps what the library warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


warnings = Warnings()
logging.getLogger("ecospa_fx").addHandler(warnings)


def zoo(folder: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("factories", folder / "factories.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["factories"] = module
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.F
    return found


def doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def loss_of(output: Any) -> Tensor:
    floats = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.square().mean() for t in floats]).sum()


def built(make: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], float]:
    """Model in training mode, arguments, and the difference that its type allows."""
    model, args, kwargs = make()
    args, kwargs = tuple(args), dict(kwargs or {})
    wide_args, wide = pytree.tree_map(doubled, (args, kwargs))
    try:
        with torch.no_grad():
            model.double()(*wide_args, **wide)
    except RuntimeError:
        return make()[0].train(), args, kwargs, 2e-5
    return model.train(), wide_args, wide, 1e-9


def check(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], allowed: float) -> str:
    """What happened; begins with "fail" where it should not have."""
    warnings.said.clear()
    dense = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    begin = time.perf_counter()
    sparse = eco.SparseTraining(
        model, args, kwargs, optimizer=optimizer, target=0.4, schedule=eco.Linear(2, 3, 1), band=None
    )
    ready = time.perf_counter() - begin
    for _ in range(STEPS):
        torch.autograd.backward(loss_of(sparse.model(*args, **kwargs)))
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()
    masks, weights = sparse.plan.masks(dense), dict(sparse.model.named_parameters())
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            mask = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
            weight[mask] = weights[name].flatten()
    error = masked_error(dense.eval(), sparse.model.eval(), sparse.plan, args, kwargs)
    shrink = max((s.seconds for s in sparse.history), default=0.0)
    told = f"{sparse.removed:6.1%} removed, error {error:.1e}, {ready:.1f} s to begin, {shrink:.1f} s a shrink"
    if warnings.said:
        return f"warned: {told}; {warnings.said[0]}"
    return told if error < allowed and len(sparse.history) == 2 else f"fail: {told}, {len(sparse.history)} shrinks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models, failed = zoo(arguments.zoo), 0
    for name in arguments.names or models:
        torch.manual_seed(0)
        try:
            told = check(*built(models[name]))
        except EcospaError as error:
            told = f"refused: {error}"
        except Exception as error:
            told = f"fail: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        failed += told.startswith("fail")
        print(f"{name:24} {told}", flush=True)
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
