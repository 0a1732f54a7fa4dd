"""Every model of a zoo: couplings offered and blocked, what detecting and shrinking cost, exactness, saving.

    python benchmarks/zoo.py                    # every model of ../shared/zoo
    python benchmarks/zoo.py FOLDER --models llama gpt2

FOLDER holds a ``factories.py`` whose dictionary ``F`` has a function per name that returns (model, args, kwargs).
Export and detection (with a fresh export of its own) are timed one after the other, and `shrink` beside one export with
the symbolic sizes that it ends up with, both in seconds of this process's own work; exactness is the largest relative
difference between a model shrunk by a random plan and the masked one, in float64, or in float32 where the model's own
code does not run in float64. A model is untouched that is after detecting and shrinking what it was when it was made:
attributes, hooks, buffers, classes, modes, parameters and their versions. The smaller model is saved and loaded into a
model without these weights: it must have the same names, shapes and types, and return the same bits. Prints a table and
writes results/zoo.json.
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
from contextlib import redirect_stderr, redirect_stdout
from importlib import util
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.utils import _pytree as pytree

import ecospa_fx as eco
from ecospa_fx.capture.attempts import attempts, takes_one
from ecospa_fx.capture.export_view import export_view
from ecospa_fx.ir.pytrees import opened
from ecospa_fx.snapshot import Snapshot
from ecospa_fx.verify import masked_error

HERE = Path(__file__).resolve().parent
RATIOS = {"detection": "ratio", "shrinking": "shrink_ratio"}
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
    """A model that was never called, with its inputs, in float64 if it runs there, else as it is."""
    model, args, kwargs = make()
    inputs = pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
                             (args, kwargs))  # fmt: skip
    try:
        with torch.no_grad():
            model.double()(*inputs[0], **inputs[1])
    except RuntimeError:
        return make(), "float32"
    return (make()[0].double(), *inputs), "float64"


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


def symbolic_export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Seconds of one export with the symbolic sizes that `shrink` ends up with; attempts that fail do not count."""
    parts: tuple[tuple[Any, ...], dict[str, Any]] = opened((args, kwargs))
    view = export_view(model, parts[1])
    for attempt in attempts(view, *parts):
        begin = time.process_time()
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                program = torch.export.export(
                    view, attempt.args, attempt.kwargs, strict=False, dynamic_shapes=attempt.shapes
                )
        except Exception:  # whatever the code of a model raises for symbols; the next attempt has fewer
            continue
        if not attempt.doubled or takes_one(program):
            return time.process_time() - begin
    raise ValueError("no attempt at an export succeeds")


def measure(make: Callable[[], Example], repeats: int) -> dict[str, Any]:
    """Counts, seconds and exactness of one model."""
    (model, args, kwargs), dtype = made(make)
    snapshot = Snapshot([model], traced=True)
    exports, detections, symbolic, shrinks = [], [], [], []
    for _ in range(repeats):
        exported = made(make)[0][0]
        begin = time.perf_counter()
        torch.export.export(exported, args, kwargs, strict=False)
        exports.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        couplings = eco.detect(model, args, kwargs)
        detections.append(time.perf_counter() - begin)
    plan = eco.plan(couplings, ratio=0.5, scores="random", seed=0)
    for _ in range(repeats):
        symbolic.append(symbolic_export(made(make)[0][0], args, kwargs))
        begin = time.process_time()
        small = eco.shrink(model, plan, args, kwargs)
        shrinks.append(time.process_time() - begin)
    changes = snapshot.changes()
    error = masked_error(model, small, plan, args, kwargs)
    return {
        "offered": len(couplings.offered),
        "blocked": len(couplings.blocked),
        "removed": plan.removed_parameters,
        "export_s": round(min(exports), 3),
        "detect_s": round(min(detections), 3),
        "ratio": round(min(detections) / min(exports), 2),
        "symbolic_export_s": round(min(symbolic), 3),
        "shrink_s": round(min(shrinks), 3),
        "shrink_ratio": round(min(shrinks) / min(symbolic), 2),
        "error": float(f"{error:.1e}"),
        "dtype": dtype,
        "exact": error <= LIMITS[dtype],
        "comes_back": comes_back(small, make),
        "untouched": not changes,
        "changes": changes[:5],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per model and a line of totals."""
    times = ["export_s", "detect_s", "ratio", "symbolic_export_s", "shrink_s", "shrink_ratio"]
    head = ["model", "offered", "blocked", *times, "error", "dtype", "comes_back", "untouched"]
    lines = [[r["model"], *([r["failed"]] if "failed" in r else [r[h] for h in head[1:]])] for r in rows]
    told = tabulate(lines, head, disable_numparse=True)
    middle = "".join(
        f", {verb} over export {summary['median']} in the median and {summary['worst']} at worst"
        for verb, summary in ratios(rows).items()
    )
    exact, back, untouched = (sum(bool(r.get(n)) for r in rows) for n in ("exact", "comes_back", "untouched"))
    offered, blocked = (sum(r.get(n, 0) for r in rows) for n in ("offered", "blocked"))
    told += f"\n{exact} of {len(rows)} models exact, {back} the same after saving and loading"
    told += f", {untouched} left as they were"
    return f"{told}, {offered} couplings offered, {blocked} blocked{middle}"


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and worst of what detecting and shrinking take over an export."""
    found = {verb: sorted(r[key] for r in rows if key in r) for verb, key in RATIOS.items()}
    return {verb: {"median": all_[len(all_) // 2], "worst": all_[-1]} for verb, all_ in found.items() if all_}


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
    first, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), torch.ones(2, 4)
    eco.shrink(first, eco.plan(eco.detect(first, (x,)), 0.5), (x,))  # what is imported once counts for no model
    for name in arguments.models or zoo:
        if name not in zoo:
            raise SystemExit(f"there is no model {name!r} in {arguments.folder}; it has {', '.join(zoo)}")
        try:
            rows.append({"model": name, **measure(zoo[name], arguments.repeats)})
        except Exception as error:  # whatever the code of a model raises; the others are measured all the same
            rows.append({"model": name, "failed": f"{type(error).__name__}: {error}"[:200]})
        print(f"{len(rows):>3} {name}", file=sys.stderr, flush=True)
        versions = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        arguments.json.write_text(
            json.dumps({**versions, "repeats": arguments.repeats, "ratios": ratios(rows), "models": rows}, indent=1)
        )
    print(table(rows))


if __name__ == "__main__":
    main()
