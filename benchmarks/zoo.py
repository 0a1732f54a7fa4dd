"""Every model of a zoo: couplings offered and blocked, what detection costs beside the export, exactness, saving.

    python benchmarks/zoo.py                    # every model of ../shared/zoo
    python benchmarks/zoo.py FOLDER --models llama gpt2

FOLDER holds a ``factories.py`` whose dictionary ``F`` has a function per name that returns (model, args, kwargs).
Export and detection (with a fresh export of its own) are timed one after the other; exactness is the largest relative
difference between a model shrunk by a random plan and the masked one, in float64, or in float32 where the model's own
code does not run in float64. The smaller model is saved and loaded into a model without these weights: it must have the
same names, shapes and types, and return the same bits. Prints a table and writes results/zoo.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.utils import _pytree as pytree

import ecospa_fx as eco
from ecospa_fx.verify import masked_error

HERE = Path(__file__).resolve().parent
LIMITS = {"float64": 1e-9, "float32": 2e-5}
Example = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


def factories(folder: Path) -> dict[str, Callable[[], Example]]:
    """The models of a folder; SystemExit in one sentence where it has none."""
    path = folder / "factories.py"
    spec = util.spec_from_file_location("zoo_factories", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SystemExit(f"there is no zoo in {folder}: name a folder with a factories.py that fills a dictionary F")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Callable[[], Example]] = module.F
    return found


def made(make: Callable[[], Example]) -> tuple[Example, str]:
    """A model with its inputs in float64 if it runs there, else as it is."""
    model, args, kwargs = make()
    inputs = pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
                             (args, kwargs))  # fmt: skip
    try:
        with torch.no_grad():
            model.double()(*inputs[0], **inputs[1])
    except RuntimeError:
        return make(), "float32"
    return (model, *inputs), "float64"


def numbers(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a model returns."""
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, torch.Tensor)]


def same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether tensors are equal bit for bit, NaN included."""
    return len(some) == len(others) and all(
        a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(some, others, strict=True)
    )


def comes_back(small: torch.nn.Module, make: Callable[[], Example]) -> bool:
    """Whether saving and loading give the same module; what `make` builds loses its weights before it is filled."""

    def without_weights() -> Example:
        model, args, kwargs = made(make)[0]
        with torch.no_grad():
            for tensor in model.state_dict(keep_vars=True).values():
                tensor.zero_()
        return model, args, kwargs

    with tempfile.TemporaryDirectory() as folder:
        eco.save(small, Path(folder) / "small")
        back = eco.load(Path(folder) / "small", model=without_weights)
    args, kwargs = made(make)[0][1:]
    own, loaded = small.state_dict(), back.state_dict()
    return (
        list(own) == list(loaded)
        and same(list(own.values()), list(loaded.values()))
        and same(numbers(small, args, kwargs), numbers(back, args, kwargs))
    )


def measure(make: Callable[[], Example], repeats: int) -> dict[str, Any]:
    """Counts, seconds and exactness of one model."""
    (model, args, kwargs), dtype = made(make)
    exports, detections = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        torch.export.export(model, args, kwargs, strict=False)
        exports.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        couplings = eco.detect(model, args, kwargs)
        detections.append(time.perf_counter() - begin)
    plan = eco.plan(couplings, ratio=0.5, scores="random", seed=0)
    small = eco.shrink(model, plan, args, kwargs)
    error = masked_error(model, small, plan, args, kwargs)
    return {
        "offered": len(couplings.offered),
        "blocked": len(couplings.blocked),
        "removed": plan.removed_parameters,
        "export_s": round(min(exports), 3),
        "detect_s": round(min(detections), 3),
        "ratio": round(min(detections) / min(exports), 2),
        "error": float(f"{error:.1e}"),
        "dtype": dtype,
        "exact": error <= LIMITS[dtype],
        "comes_back": comes_back(small, make),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per model and a line of totals."""
    head = ["model", "offered", "blocked", "export_s", "detect_s", "ratio", "error", "dtype", "comes_back"]
    lines = [[r["model"], *([r["failed"]] if "failed" in r else [r[h] for h in head[1:]])] for r in rows]
    told = tabulate(lines, head, disable_numparse=True)
    ratios = sorted(r["ratio"] for r in rows if "ratio" in r)
    middle = f", detection over export {ratios[len(ratios) // 2]} in the median" if ratios else ""
    exact, back = (sum(bool(r.get(n)) for r in rows) for n in ("exact", "comes_back"))
    offered, blocked = (sum(r.get(n, 0) for r in rows) for n in ("offered", "blocked"))
    told += f"\n{exact} of {len(rows)} models exact, {back} the same after saving and loading"
    return f"{told}, {offered} couplings offered, {blocked} blocked{middle}"


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE.parent.parent / "shared" / "zoo")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--repeats", type=int, default=2, help="of export and detection; the fastest counts")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "zoo.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    zoo, rows = factories(arguments.folder), []
    for name in arguments.models or zoo:
        if name not in zoo:
            raise SystemExit(f"there is no model {name!r} in {arguments.folder}; it has {', '.join(zoo)}")
        try:
            rows.append({"model": name, **measure(zoo[name], arguments.repeats)})
        except Exception as error:  # whatever the code of a model raises; the others are measured all the same
            rows.append({"model": name, "failed": f"{type(error).__name__}: {error}"[:200]})
        print(f"{len(rows):>3} {name}", file=sys.stderr, flush=True)
        versions = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps({**versions, "repeats": arguments.repeats, "models": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
