"""The command line: `ecospa-fx inspect`, `compress`, `report`, `export` and `verify`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ecospa_fx as eco
from ecospa_fx.budget.quantisation import exclusion_lines, exclusions
from ecospa_fx.budget.settings import PlanOptions
from ecospa_fx.calibration.causal import causal_model
from ecospa_fx.calibration.distances import Distances, noted_distances
from ecospa_fx.calibration.second_text import JUDGES
from ecospa_fx.calibration.token_call import NotCausalError
from ecospa_fx.cli import options, text
from ecospa_fx.cli.sources import Source, open_exportable, open_source
from ecospa_fx.compression import CompressOptions
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.report import couplings_data, explain, reason_lines
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.defaults import NO_BATCHES
from ecospa_fx.errors import EcospaError, PlanError, ScoreError, StorageError
from ecospa_fx.export.certificate import EngineRun, Exactness
from ecospa_fx.export.check import check_export
from ecospa_fx.export.tokenizers import has_tokenizer
from ecospa_fx.huggingface import is_causal
from ecospa_fx.importance.losses import Loss
from ecospa_fx.importance.second_order import SECOND_ORDER
from ecospa_fx.origin import origin, origin_of
from ecospa_fx.plan import Plan
from ecospa_fx.progress import TimedSteps, progress_bar
from ecospa_fx.report.verb import check_path
from ecospa_fx.storage.folder import refuse_existing
from ecospa_fx.storage.manifest import CONFIG, MANIFEST, PLAN
from ecospa_fx.storage.models import save
from ecospa_fx.verify import masked_error

REFUSED = 2
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
LENGTH, HELD_OUT = 512, 64
BYTES = "bytes"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. 0 where it was done; 2 where it was refused, after one sentence on stderr; 130 if interrupted."""
    try:
        arguments = parser().parse_args(argv)
        command: Callable[[argparse.Namespace], None] = arguments.command
        command(arguments)
    except EcospaError as error:
        print(f"ecospa-fx: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("ecospa-fx: interrupted, nothing was saved", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The commands with all their options."""
    return options.parser(inspect, compress, report, export, verify)


# -- inspect -----------------------------------------------------------------------------------------------------


def inspect(arguments: argparse.Namespace) -> None:
    """Print the couplings of a model."""
    if arguments.html is not None:
        check_path(arguments.html)
    source = open_source(arguments.source, weights=False)
    begin = time.perf_counter()
    couplings = eco.detect(source.model, source.args, source.kwargs, allow=arguments.allow, part=arguments.part)
    seconds = time.perf_counter() - begin
    if arguments.explain is not None:
        print(explain(coupling_named(couplings, arguments.explain)))
    elif arguments.json:
        more = {"excluded": [asdict(x) for x in exclusions(couplings)], "seconds": round(seconds, 3)}
        print(json.dumps({**couplings_data(couplings), "source": arguments.source, **more}))
    else:
        print(couplings)
        reasons = (*reason_lines(couplings, "inexact"), *reason_lines(couplings, "blocked"))
        for line in (*reasons, *exclusion_lines(exclusions(couplings))):
            print(line)
        print(f"{type(source.model).__name__}, detected in {seconds:.1f} s")
    if arguments.html is not None:
        written = eco.report(couplings, path=arguments.html)
        print(f"report: {written}", file=sys.stderr if arguments.json else sys.stdout)


def coupling_named(couplings: Couplings, name: str) -> Coupling:
    """The coupling, or an error with names like it."""
    names = [c.name for c in couplings]
    if name in names:
        return couplings[name]
    near = get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    raise options.UsageError(f"there is no coupling {name!r}; near it: {', '.join(near) or 'none, nothing was found'}")


# -- compress ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of two texts that do not overlap."""

    calibration: Tensor
    """LongTensor [windows, length]; no windows where the model writes them all."""
    held_out: Tensor
    """LongTensor [windows, length + 1], or as long as the model reads where it wrote them."""
    is_own: bool
    """Whether the held-out text is the model's own."""

    def on(self, device: str) -> Texts:
        """The same on a device."""
        return replace(self, calibration=self.calibration.to(device), held_out=self.held_out.to(device))


def compress(arguments: argparse.Namespace) -> None:
    """Shrink a language model, save it, and print what it cost. Everything cheap is checked before anything slow."""
    options.check_options(arguments)
    if arguments.html is not None:
        check_path(arguments.html)
    watch = TimedSteps(announce=True)
    calibration, held_out = calibration_and_held_out(arguments)
    encode = encoder(arguments) if calibration or held_out else text.bytes_encoder
    source, stored = watch("load", open_model, arguments)
    model, reader = source.model, text.Reader(source.args, source.kwargs)
    length = window_length(arguments.length, model)
    vocabulary = vocabulary_of(model, reader)
    writes = check_writes(arguments, source)
    texts = watch("tokenise", windows_of, arguments, (calibration, held_out), encode, length)
    check_tokens(texts, vocabulary)
    if texts.is_own:
        texts = replace(texts, held_out=watch("held-out text", written, arguments, source, reader, length))
    texts = texts.on(arguments.device)

    couplings = watch("detect", eco.detect, model, source.args, source.kwargs, allow=arguments.allow)
    asked: PlanOptions = {"exclude": arguments.exclude, "limits": options.limits(arguments)}
    eco.plan(couplings, arguments.ratio, "magnitude", round_to=arguments.round_to, **asked)  # refuses out of reach
    loss = None if writes else reader.loss
    small = watch("compress", smaller, arguments, source, couplings, reader, texts, loss)
    plan = origin_of(small).plan
    error, limit = watch("check", exactness, source, plan, reader, texts.held_out[:1, :-1])
    if not error <= limit:
        raise PlanError(f"removing differs from masking by {error:.1e}, so nothing was saved")
    rows = watch("measure", measure, (model, small), reader, texts.held_out, stored)
    rows[-1][0] += ", own text" if texts.is_own else ""
    watch("save", save, small, arguments.output, origin=origin(model, plan, source.args, source.kwargs), dtypes=stored)
    print(plan)
    for line in reason_lines(couplings, "inexact"):
        print(line)
    print(summary(rows, error, watch, arguments.output, plan, noted_distances(small)))
    if arguments.html is not None:
        checked = Exactness(against="masking", error=error, dtype="float64" if limit < 1e-6 else "float32")
        shown = eco.report(couplings, plan=plan, figures=figures(rows), exactness=checked, path=arguments.html)
        print(f"report: {shown}")


def calibration_and_held_out(arguments: argparse.Namespace) -> tuple[str, str]:
    """Calibration and held-out text; of one file the last tenth is held out, and without a file there is none."""
    if arguments.calibration is None:
        return "", text.read_text(arguments.eval) if arguments.eval else ""
    whole = text.read_text(arguments.calibration)
    return (whole, text.read_text(arguments.eval)) if arguments.eval else text.split(whole)


def encoder(arguments: argparse.Namespace) -> text.Encoder:
    """The tokenizer that was named, or the first one beside the model or the calibration text."""
    if arguments.tokenizer == BYTES:
        return text.bytes_encoder
    if arguments.tokenizer:
        return text.read_tokenizer(Path(arguments.tokenizer))
    beside = [file.parent for file in (arguments.calibration, arguments.eval) if file is not None]
    folders = dict.fromkeys(f for f in (Path(arguments.source), *beside[:1]) if f.is_dir())
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return text.read_tokenizer(folder / "tokenizer.json")
    looked = " or ".join(map(str, folders))
    raise StorageError(f"there is no tokenizer.json in {looked}: pass --tokenizer FILE, or 'bytes' for a byte model")


def open_model(arguments: argparse.Namespace) -> tuple[Source, dict[str, torch.dtype]]:
    """The model in float32 on the device, and the types that its tensors are stored in."""
    source = open_source(arguments.source, weights=True)
    model = source.model.eval()
    if not is_causal(model):
        raise ScoreError(
            f"{type(model).__name__} is no causal language model, and next-token perplexity is all that this command "
            "measures: call eco.compress with batches and a loss of your own"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise StorageError(f"parameter {name!r} is on meta and has no values: load the weights first")
        if not parameter.isfinite().all():
            raise StorageError(f"parameter {name!r} holds values that are not finite: repair the weights first")
    stored = {n: t.dtype for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.to(arguments.device) if isinstance(leaf, Tensor) else leaf, (source.args, source.kwargs)
    )
    return Source(model.to(arguments.device), args, kwargs, source.folder), stored


def window_length(asked: int | None, model: nn.Module) -> int:
    """Tokens per window, within what the model's configuration allows."""
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 0 else math.inf
    if asked is not None and asked > most:
        raise options.UsageError(f"--length is {asked} and this model reads at most {most} tokens")
    return asked or int(min(LENGTH, most))


def vocabulary_of(model: nn.Module, reader: text.Reader) -> int:
    """Size of the vocabulary, from one run on two tokens."""
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            return reader.logits(model, torch.zeros(1, 2, dtype=torch.long, device=device)).shape[-1]
    except EcospaError:
        raise
    except Exception as error:  # the user's own code
        raise ScoreError(f"{type(model).__name__} fails on one sequence of two tokens: {error}") from error


def windows_of(arguments: argparse.Namespace, parts: tuple[str, str], encode: text.Encoder, length: int) -> Texts:
    """Windows of both texts, none where there is no text."""
    calibration, held_out = (text.tokens(part, encode) for part in parts)
    none = torch.empty(0, length, dtype=torch.long)
    return Texts(
        text.random_windows(calibration, length, arguments.windows, arguments.seed) if parts[0] else none,
        text.first_windows(held_out, length, HELD_OUT) if parts[1] else none,
        not parts[1],
    )


def check_writes(arguments: argparse.Namespace, source: Source) -> bool:
    """Whether the model writes text of its own. Raises ScoreError where it does not and there is no other."""
    try:
        causal_model(source.model, source.args, source.kwargs)
    except NotCausalError as reason:
        if arguments.calibration is None:
            raise ScoreError(
                f"{type(source.model).__name__} cannot write calibration text because {reason}: pass --calibration FILE"
            ) from reason
        return False
    return True


def written(arguments: argparse.Namespace, source: Source, reader: text.Reader, length: int) -> Tensor:
    """Windows of the model's own text, which `compress` holds out, too."""
    model, args, kwargs = source.model, source.args, source.kwargs
    batches = eco.calibration.generated(model, args, kwargs, count=JUDGES, length=length, seed=arguments.seed)
    return torch.cat([reader.ids(*batch) for batch in batches])


def check_tokens(texts: Texts, vocabulary: int) -> None:
    """Raise StorageError where the tokenizer is not the model's."""
    largest = max((int(ids.max()) for ids in (texts.calibration, texts.held_out) if len(ids)), default=0)
    if largest >= vocabulary:
        raise StorageError(
            f"the tokenizer gives token {largest} and the model knows {vocabulary:,}: pass the model's own tokenizer"
        )


def smaller(
    arguments: argparse.Namespace, source: Source, couplings: Couplings, reader: text.Reader, texts: Texts,
    loss: Loss | None,
) -> nn.Module:  # fmt: skip
    """The smaller model, with one batch per calibration window. loss: None where the model writes text, too."""
    asked: CompressOptions = {
        "round_to": arguments.round_to, "exclude": arguments.exclude, "limits": options.limits(arguments),
        "progress": True, "generated_windows": arguments.windows, "seed": arguments.seed,
    }  # fmt: skip
    if arguments.method not in {SECOND_ORDER, "magnitude"}:
        asked["steps"] = arguments.passes
    ratio: float = arguments.ratio
    return eco.compress(
        source.model,
        source.args,
        source.kwargs,
        ratio=ratio,
        batches=[reader.batch(window[None]) for window in texts.calibration] or NO_BATCHES,
        loss=loss,
        method=arguments.method,
        couplings=couplings,
        **asked,
    )


def exactness(source: Source, plan: Plan, reader: text.Reader, ids: Tensor) -> tuple[float, float]:
    """(difference, limit): the smaller model against the masked one on one window.

    In float64, or in float32 where the model's own code does not run in float64. What was allowed to be inexact is
    left out: it differs by what was asked for.
    """
    plan = Plan(tuple(s for s in plan if not s.inexact), plan.shapes)
    model, args, kwargs = deepcopy(source.model).double(), source.args, source.kwargs
    try:
        with torch.no_grad():
            reader.logits(model, ids)
    except RuntimeError:
        model = deepcopy(source.model)
    small = eco.shrink(model, plan, args, kwargs)
    inputs = reader.batch(ids.expand(2, -1) if ids.shape[0] == 1 else ids)
    return masked_error(model, small, plan, *inputs), TOLERANCE[next(model.parameters()).dtype]


def measure(
    models: Sequence[nn.Module], reader: text.Reader, held_out: Tensor, stored: dict[str, torch.dtype]
) -> list[list[str]]:
    """Rows of the closing table: parameters, bytes as stored, FLOPs per token, perplexity."""
    counts, sizes, flops, perplexities = [], [], [], []
    for name, model in zip(("dense", "small"), models, strict=True):
        parameters = dict(model.named_parameters())
        counts.append(sum(p.numel() for p in parameters.values()))
        sizes.append(sum(p.numel() * stored.get(n, p.dtype).itemsize for n, p in parameters.items()))
        flops.append(flops_per_token(model, reader, held_out[:1, :-1]))
        perplexities.append(text.perplexity(model, reader, progress_bar(held_out, f"perplexity, {name}")))
    rows = [
        [label, *(f"{n:,}" for n in pair), f"{pair[1] / max(pair[0], 1):.1%}"]
        for label, pair in (("parameters", counts), ("bytes", sizes), ("FLOPs per token", flops))
    ]
    return [*rows, ["perplexity", *(f"{p:.2f}" for p in perplexities), f"{perplexities[1] / perplexities[0]:.1%}"]]


def figures(rows: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """The closing table as numbers: by model, by measure."""
    return {
        model: {row[0]: float(row[column].replace(",", "")) for row in rows}
        for column, model in ((1, "dense"), (2, "small"))
    }


def flops_per_token(model: nn.Module, reader: text.Reader, ids: Tensor) -> int:
    """Forward floating-point operations per token of one window, attention included.

    The fused attention kernels are not counted alike on all devices, so attention runs as matrix products here.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        reader.logits(model, ids)
    return round(counter.get_total_flops() / ids.numel())


def summary(
    rows: list[list[str]], error: float, watch: TimedSteps, output: Path, plan: Plan, distances: Distances | None
) -> str:
    """What changed, how exact it is, how far from the dense model, how long it took, and how to load it."""
    align = ("left", "right", "right", "right")
    table = tabulate(rows, ["", "dense", "small", "small/dense"], colalign=align, disable_numparse=True)
    inexact = sum(bool(s.inexact) for s in plan)
    apart = f", without {inexact:,} inexact couplings (--allow {plan.allow[0]})" if inexact else ""
    seconds = ", ".join(f"{step} {spent:.1f}" for step, spent in watch.seconds.items())
    apart_by = "" if distances is None else f"nats per token from the dense model: {distances}\n"
    return (
        f"\n{table}\n\n{apart_by}removing against masking: largest relative difference {error:.1e}{apart}\n"
        f"seconds: {seconds}, together {sum(watch.seconds.values()):.1f}\n"
        f'saved: model = ecospa_fx.load("{output}")'
    )


# -- report ------------------------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace) -> None:
    """Write the page of a model, and of a plan for it: of a saved model, its own."""
    check_path(arguments.output)
    path = Path(arguments.source)
    saved = (path / MANIFEST).is_file()
    file = arguments.plan or (path / PLAN if saved else None)
    plan = None if file is None else read_plan(file)
    source = open_source(str(path / CONFIG) if saved else arguments.source, weights=False)
    allow = {*arguments.allow, *(() if plan is None else plan.allow)}
    couplings = eco.detect(source.model, source.args, source.kwargs, allow=sorted(allow))
    print(f"report: {eco.report(couplings, plan=plan, path=arguments.output)}")


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises StorageError where there is none."""
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"there is no readable plan {path}: pass what Plan.to_json wrote") from error


# -- export and verify -------------------------------------------------------------------------------------------


def export(arguments: argparse.Namespace) -> None:
    """Write a saved or exported model in the format of another engine."""
    refuse_existing(arguments.output)
    folder = Path(arguments.folder)
    model = open_exportable(folder)
    tokenizer = arguments.tokenizer or (folder if has_tokenizer(folder) else None)
    named = getattr(torch, arguments.dtype or "", None)
    dtype = named if isinstance(named, torch.dtype) else arguments.dtype
    certificate = eco.export(model, arguments.output, format=arguments.format, dtype=dtype, tokenizer=tokenizer)
    print(text_of(certificate.engine))
    print(f"exported: {arguments.output}")


def verify(arguments: argparse.Namespace) -> None:
    """Check an export against its certificate, and say what was checked."""
    checked = check_export(arguments.path)
    print(f"{checked.files} files have their digests")
    exactness = checked.certificate.exactness
    if exactness is not None:
        print(f"removing against {exactness.against}: largest relative difference {exactness.error:.1e}")
    if checked.error is not None:
        print(text_of(checked.certificate.engine))
        print(f"run again: largest difference {checked.error:.1e} of the largest number")
    for note in checked.notes:
        print(f"not checked: {note}")


def text_of(engine: EngineRun | None) -> str:
    """How far an engine is off, in one line."""
    if engine is None:
        return "the engine is not installed, so that it was not run"
    return f"{engine.engine}: largest error {engine.largest_error:.1e}, of numbers up to {engine.largest_output:.3g}"


if __name__ == "__main__":
    sys.exit(main())
