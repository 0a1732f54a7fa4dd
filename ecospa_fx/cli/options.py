"""The options of the command line, with their help texts and the checks that come before any work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn, get_args

import torch

import ecospa_fx as eco
from ecospa_fx.budget.alignment import ENGINES
from ecospa_fx.coupling.detection import ALLOWED
from ecospa_fx.errors import EcospaError
from ecospa_fx.export.verb import Format
from ecospa_fx.importance.methods import method_named
from ecospa_fx.importance.second_order import SECOND_ORDER
from ecospa_fx.storage.folder import refuse_existing

Command = Callable[[argparse.Namespace], None]

SOURCE = "Hugging Face folder, or package.module:function"

SOURCES = """\
SOURCE: the function returns (model, args, kwargs), its example inputs.
"""

INSPECTED = """\
A config.json alone will do too: the model is built without weights.
"""

METHODS = """\
--method second-order: scores by curvature, and the remaining weights are
    updated to compensate for removed units.
--method gate-fisher, fisher, taylor, magnitude: scores only.
PATTERN: a shell pattern on module paths, such as 'model.layers.0.*'. For
    --limit also a kind of coupling, such as ffn=0.5.
"""

ALLOWANCES = """\
--allow renormalise: couplings that only a norm over them blocks; inexact.
--allow cache: couplings that make the caches of the model narrower.
"""


REPORTED = """\
Of a folder that compress wrote, its own plan is shown. The page takes
seconds after detection, and needs: pip install "ecospa-fx[report]".
"""

HTML = "write a page to look at"

EXPORTED = """\
--format transformers: a folder for from_pretrained.
--format gguf: a file for llama.cpp; --dtype may be q8_0, too.
--format onnx: a file for ONNX Runtime.
--dtype: float32, float16 or bfloat16.
"""

VERIFIED = """\
Digests of all files and of the weights, and the engine's output on the
inputs that the certificate holds. Code in the folder is not executed.
"""


class UsageError(EcospaError):
    """Options that the command line does not take."""


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parser(inspect: Command, compress: Command, report: Command, export: Command, verify: Command) -> Parser:
    """The commands, which do the work, with all their options."""
    result = Parser(prog="ecospa-fx", description=(eco.__doc__ or "").partition("\n")[0])
    result.add_argument("--version", action="version", version=f"ecospa-fx {eco.__version__}")
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    _add_inspect(commands).set_defaults(command=inspect)
    _add_compress(commands).set_defaults(command=compress)
    _add_report(commands).set_defaults(command=report)
    _add_export(commands).set_defaults(command=export)
    _add_verify(commands).set_defaults(command=verify)
    return result


def _add_inspect(commands: argparse._SubParsersAction[Parser]) -> Parser:
    command = _command(commands, "inspect", "show the couplings of a model", SOURCES + INSPECTED + ALLOWANCES)
    add = command.add_argument
    add("source", metavar="SOURCE", help=SOURCE)
    add("--json", action="store_true", help="print the couplings as JSON")
    add("--explain", metavar="NAME", help="why this coupling's parameters shrink together")
    add("--html", type=Path, metavar="FILE", help=HTML)
    _add_allow(command)
    return command


def _add_compress(commands: argparse._SubParsersAction[Parser]) -> Parser:
    command = _command(
        commands, "compress", "shrink a causal language model and measure it", SOURCES + METHODS + ALLOWANCES
    )
    add = command.add_argument
    add("source", metavar="SOURCE", help=SOURCE)
    add("--ratio", type=float, required=True, metavar="R", help="share of coupled parameters to remove, 0 to 1")
    add("--calibration", type=Path, required=True, metavar="FILE", help="calibration text, .txt or .txt.xz")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder for the smaller model")
    add("--method", default=SECOND_ORDER, metavar="NAME", help="importance scores (default: second-order)")
    add("--eval", type=Path, metavar="FILE", help="held-out text (default: last tenth of calibration)")
    add("--tokenizer", metavar="FILE", help="tokenizer.json, or bytes (default: beside the model)")
    add("--windows", type=int, default=128, metavar="N", help="calibration windows (default: 128)")
    add("--passes", type=int, default=4, metavar="N", help="scoring passes, not of second-order (default: 4)")
    add("--length", type=int, metavar="L", help="tokens per window (default: at most 512)")
    add(
        "--round-to",
        type=_rounding,
        metavar="N",
        help=f"units, or {', '.join(ENGINES)}",
    )
    add("--seed", type=int, default=0, metavar="S", help="random seed of the windows (default: 0)")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="do not shrink these modules; repeatable")
    add("--limit", action="append", default=[], metavar="PATTERN=SHARE", help="largest share to remove; repeatable")
    add("--html", type=Path, metavar="FILE", help=HTML)
    _add_allow(command)
    add("--device", default="cpu", help="torch device, for instance cuda (default: cpu)")
    return command


def _add_report(commands: argparse._SubParsersAction[Parser]) -> Parser:
    command = _command(commands, "report", "write a page about a model and a plan", SOURCES + REPORTED + ALLOWANCES)
    add = command.add_argument
    add("source", metavar="SOURCE", help=SOURCE)
    add("--plan", type=Path, metavar="FILE", help="plan.json (default: of a saved model, its own)")
    add(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="page or picture (default: report.html)",
    )
    _add_allow(command)
    return command


def _add_export(commands: argparse._SubParsersAction[Parser]) -> Parser:
    command = _command(commands, "export", "write a smaller model for another engine", EXPORTED)
    add = command.add_argument
    add("folder", metavar="FOLDER", help="what save or an earlier export wrote")
    add("--format", required=True, choices=get_args(Format), metavar="NAME", help="the engine's format: see below")
    add("--output", type=Path, required=True, metavar="PATH", help="new folder or file")
    add("--dtype", metavar="NAME", help="type of the weights (default: as they are)")
    add("--tokenizer", type=Path, metavar="DIR", help="folder with the tokenizer (default: FOLDER)")
    return command


def _add_verify(commands: argparse._SubParsersAction[Parser]) -> Parser:
    command = _command(commands, "verify", "check an export against its certificate", VERIFIED)
    command.add_argument("path", metavar="PATH", help="an exported folder or file")
    return command


def _command(commands: argparse._SubParsersAction[Parser], name: str, summary: str, notes: str) -> Parser:
    """A command whose notes stand below its options, as they are."""
    layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=25)
    return commands.add_parser(name, help=summary, description=summary, epilog=notes, formatter_class=layout)


def _add_allow(command: Parser) -> None:
    command.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=ALLOWED,
        metavar="NAME",
        help="renormalise or cache: see below; repeatable",
    )


def _rounding(text: str) -> int | str:
    """A number of units, or the name of an engine; argparse says what is neither."""
    return text if text in ENGINES else int(text)


def check_options(arguments: argparse.Namespace) -> None:
    """Raise for options out of range and an output that exists, before any work."""
    if not 0 < arguments.ratio < 1:
        raise UsageError(f"--ratio is {arguments.ratio:g} and must lie between 0 and 1, both excluded")
    for name, least in (("windows", 1), ("passes", 1), ("length", 2), ("round_to", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if isinstance(value, int) and value < least:
            raise UsageError(f"--{name.replace('_', '-')} is {value} and must be at least {least}")
    if arguments.method != SECOND_ORDER:
        method_named(arguments.method, SECOND_ORDER)
    limits(arguments)
    try:
        torch.empty(0, device=arguments.device)
    except Exception as error:  # whatever the backend of a device raises
        raise UsageError(f"--device {arguments.device} cannot be used here: {error}") from error
    refuse_existing(arguments.output)


def limits(arguments: argparse.Namespace) -> dict[str, float]:
    """The shares that --limit gives, by kind or pattern."""
    shares: dict[str, float] = {}
    for limit in arguments.limit:
        key, _, share = limit.rpartition("=")
        try:
            shares[key] = float(share)
        except ValueError:
            shares[key] = -1.0
        if not key or not 0 <= shares[key] <= 1:
            raise UsageError(f"--limit {limit} is no PATTERN=SHARE with a share from 0 to 1, such as ffn=0.5")
    return shares
