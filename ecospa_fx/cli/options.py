"""The options of the command line, and what is checked of them before any work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

import ecospa_fx as eco
from ecospa_fx.coupling.detection import ALLOWED
from ecospa_fx.errors import EcospaError
from ecospa_fx.importance.methods import method_named
from ecospa_fx.recipe import SECOND_ORDER
from ecospa_fx.storage.folder import refuse_existing

Command = Callable[[argparse.Namespace], None]

ALLOW: dict[str, Any] = {
    "action": "append",
    "default": [],
    "choices": ALLOWED,
    "help": "renormalise: also what only a norm over it blocks, marked inexact; cache: narrower caches too",
}


class UsageError(EcospaError):
    """Options that the command line does not take."""


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parser(inspect: Command, compress: Command) -> Parser:
    """Both commands, which do the work, with all their options."""
    found = Parser(prog="ecospa-fx", description=eco.__doc__)
    found.add_argument("--version", action="version", version=f"ecospa-fx {eco.__version__}")
    commands = found.add_subparsers(required=True, metavar="COMMAND")
    source = "a Hugging Face folder, or package.module:function that returns (model, args, kwargs)"

    add = commands.add_parser("inspect", help="show the couplings of a model").add_argument
    add("source", metavar="SOURCE", help=f"{source}, or a config.json (no weights needed)")
    add("--json", action="store_true", help="for machines")
    add("--explain", metavar="NAME", help="why the parameters of this coupling shrink together, node by node")
    add("--allow", **ALLOW)
    commands.choices["inspect"].set_defaults(command=inspect)

    add = commands.add_parser("compress", help="shrink a causal language model and measure it").add_argument
    add("source", metavar="SOURCE", help=source)
    add("--ratio", type=float, required=True, help="share of the couplings' parameters to remove, between 0 and 1")
    add("--calibration", type=Path, required=True, metavar="FILE", help="text, .txt or .txt.xz")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder for the smaller model")
    methods = "second-order (default) also lets what stays make up for the rest; gate-fisher, fisher, taylor, magnitude"
    add("--method", default=SECOND_ORDER, help=f"{methods} only remove")
    add("--eval", type=Path, metavar="FILE", help="held-out text (default: the last tenth of the calibration text)")
    add("--tokenizer", metavar="FILE", help="tokenizer.json, or 'bytes' (default: beside the model or the text)")
    add("--windows", type=int, default=128, metavar="N", help="calibration windows (default: 128)")
    add("--passes", type=int, default=4, metavar="N", help="scoring passes of the other methods (default: 4)")
    add("--length", type=int, metavar="L", help="tokens per window (default: 512, or what the model can read)")
    add("--round-to", type=int, metavar="N", help="keep multiples of N units (default: what the device likes)")
    add("--seed", type=int, default=0, metavar="S", help="where the calibration windows are drawn (default: 0)")
    pattern = "shell pattern on module paths, such as 'model.layers.0.*'; may be repeated"
    add("--exclude", action="append", default=[], metavar="PATTERN", help=f"leave these modules whole: a {pattern}")
    limit = f"lose at most this share of a kind or of modules: ffn=0.5, or a {pattern}"
    add("--limit", action="append", default=[], metavar="PATTERN=SHARE", help=limit)
    add("--allow", **ALLOW)
    add("--device", default="cpu", help="where to compute, for instance cuda (default: cpu)")
    commands.choices["compress"].set_defaults(command=compress)
    return found


def check_options(arguments: argparse.Namespace) -> None:
    """Raise for options out of range and an output that exists, before any work."""
    if not 0 < arguments.ratio < 1:
        raise UsageError(f"--ratio is {arguments.ratio:g} and must lie between 0 and 1, both excluded")
    for name, least in (("windows", 1), ("passes", 1), ("length", 2), ("round_to", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
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
    found: dict[str, float] = {}
    for limit in arguments.limit:
        key, _, share = limit.rpartition("=")
        try:
            found[key] = float(share)
        except ValueError:
            found[key] = -1.0
        if not key or not 0 <= found[key] <= 1:
            raise UsageError(f"--limit {limit} is no PATTERN=SHARE with a share from 0 to 1, such as ffn=0.5")
    return found
