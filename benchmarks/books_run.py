"""One run of `train_books.py`: a model trained by a recipe, masked or shrunk for real, which can be paused."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from books import Gpt, Llama, Shape, Windows, evaluate, first_windows, head_loss, spread, taught_loss, tokens
from books_recipes import Due, Recipe
from masked import MaskedTraining, Options
from torch import Tensor, nn

import ecospa_fx as eco

SIZES = {
    "books": (Shape(), (24, 512)),
    "tiny": (Shape(hidden=96, layers=4, heads=3, head_dim=32, ffn=256), (12, 96)),
    "half": (Shape(hidden=256, layers=6, heads=4, head_dim=64, ffn=704), (24, 256)),
    "gpt2-medium": (Shape(hidden=1024, layers=24, heads=16, head_dim=64, ffn=4096, gated=False), (28, 1792)),
    "bytes": (Shape(vocabulary=256, hidden=128, layers=4, heads=4, head_dim=32, ffn=352), (12, 128)),
}
ASIDE = 0.01
"""Share of the training tokens, the last ones, that is kept aside."""
GROUPS = {"o.weight": "heads", "down.weight": "ffn", "embed.weight": "embed", "place.weight": "embed"}
"""Matrices that have a learning rate of their own: consumers by what they read, and embeddings."""
SAME = ("size", "shards", "tokens", "unique", "batch", "length", "lr", "window", "round_to", "measured", "graph")
"""Options that a run keeps over all its sittings."""


class Run:
    """One model trained by one recipe.

    shape: the model's, if not the recipe's. With a pause, it stops after so many seconds and is kept in the folder of
    checkpoints; made again from the same arguments, it goes on from there as if it had not stopped.
    """

    def __init__(self, recipe: Recipe, seed: int, options: argparse.Namespace, shape: Shape | None = None) -> None:
        self.begin, self.spent, self.done, self.ready = 0.0, 0.0, 0, False
        self.curve, self.totals, self.shrinks = list[float](), list[Tensor](), list[dict[str, float]]()
        self.recipe, self.options, self.device = recipe, options, torch.device(options.device)
        train, valid = tokens(options.data, options.cache, options.shards)
        kept = int(len(train) * (1 - ASIDE))
        used = min(kept, options.unique or kept)
        self.windows = Windows(train[:used].to(self.device), options.length, options.batch, seed)
        self.aside = spread(train[kept:], options.length, options.held).to(self.device)
        self.first = first_windows(valid, options.length, min(64, options.held)).to(self.device)
        self.valid = spread(valid, options.length, options.held).to(self.device)
        dense, small = SIZES[options.size]
        torch.manual_seed(seed)
        self.shape = shape or (dense.at(*small) if recipe.kind == "small" else dense)
        made = (Llama if self.shape.gated else Gpt)(self.shape, options.length)
        self.model: nn.Module = made.to(self.device)
        self.steps = int(options.tokens * recipe.more / (options.batch * options.length))
        self.optimizer = self._optimizer()
        self.masked: MaskedTraining | None = None
        self.sparse: eco.SparseTraining | None = None
        self.teacher: nn.Module | None = None
        target = 1 - dense.at(*small).block_parameters / dense.block_parameters
        if recipe.kind == "sparse" and options.graph:
            self.sparse = self._sparse(target)
            self.model = self.sparse.model
        elif recipe.kind == "sparse":
            self.masked = self._masked(target)
            self.teacher = deepcopy(self.model).requires_grad_(False) if recipe.distill else None
        name = re.sub("[^A-Za-z0-9.]+", "-", recipe.name)
        self.kept_at = options.checkpoints and options.checkpoints / f"{options.size}-{name}-{seed}.pt"
        if self.kept_at is not None and self.kept_at.exists():
            self.load_state_dict(torch.load(self.kept_at, map_location=self.device))
        self._compile()

    def _compile(self) -> None:
        """After what was kept is there: from then on widths change by shrinks alone."""
        self.loss, self.taught = head_loss, taught_loss
        if self.options.compile:
            self.loss, self.taught = (torch.compile(f, dynamic=False) for f in (head_loss, taught_loss))
            for model in (self.model, self.teacher):
                for layer in () if model is None else model.get_submodule("layers").children():
                    layer.compile(dynamic=False, mode=self.options.mode)

    def _optimizer(self) -> torch.optim.AdamW:
        """Its groups have the key `group`, one of GROUPS, "" for other matrices, or "plain" for what does not decay."""
        found: dict[str, list[Tensor]] = {"": [], "heads": [], "ffn": [], "embed": [], "plain": []}
        for name, parameter in self.model.named_parameters():
            group = GROUPS.get(".".join(name.split(".")[-2:]), "")
            found[group if parameter.dim() == 2 else "plain"].append(parameter)
        groups = [
            {"params": own, "weight_decay": 0.0 if group == "plain" else 0.1, "group": group}
            for group, own in found.items()
        ]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, self.recipe.beta2), fused=self.device.type == "cuda")

    def _masked(self, target: float) -> MaskedTraining:
        r = self.recipe
        low, high = (float(x) for x in r.band.split(","))
        options = Options(
            target, r.scores, r.allocation, (low, high), self.options.round_to, self.options.window, r.compensate,
            r.damping, r.fade,
        )  # fmt: skip
        return MaskedTraining(self.model, next(iter(self.windows))[:, :-1], self.optimizer, options)

    def _sparse(self, target: float) -> eco.SparseTraining:
        r, options = self.recipe, self.options
        if r.fade or r.distill:
            raise SystemExit(f"{r.name!r} needs what only masked runs do: leave --graph out")
        low, high = (float(x) for x in r.band.split(","))
        source = Windows(self.windows.data, self.windows.length, 8, 1)
        given: list[tuple[tuple[Tensor], dict[str, Any]]] = [
            ((w[:, :-1],), {}) for _, w in zip(range(options.measured), source, strict=False)
        ]
        model = self.model

        def loss(output: Tensor, args: Sequence[Any], kwargs: Any) -> Tensor:
            return head_loss(output[:, :-1], model.get_parameter("embed.weight").detach(), args[0][:, 1:])

        return eco.SparseTraining(
            model, (next(iter(self.windows))[:, :-1],), optimizer=self.optimizer, target=target,
            schedule=r.schedule(self.steps), allocation=r.allocation, band=(low, high),
            scores="second-order" if r.compensate == "full" else r.scores, compensate=r.compensate != "none",
            batches=given, loss=loss, round_to=options.round_to, window=options.window,
        )  # fmt: skip

    def rate(self, step: int, schedule: Due) -> float:
        """Learning rate of a step, counted from 1."""
        r, rise = self.recipe, max(1, round(self.recipe.rise * self.steps))
        place = (step - 1) / self.steps
        left = {
            "linear": 1 - place,
            "cosine": 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * place)).item(),
            "flat": min(1.0, (1 - place) / (1 - r.flat)),
        }[r.decay]
        since = min((step - s for s in schedule.steps if s < step), default=self.steps)
        again = min(1.0, since / r.warm) if r.warm else 1.0
        size = 1 + (r.after - 1) * schedule.share(step - 1)
        return float(self.options.lr * r.rate * size * min(1.0, step / rise) * left * again)

    def factors(self, share: float) -> dict[str, float]:
        """Factors of the learning rate by group, where it is not 1, at a share of the target."""
        recipe, (_, (head_dim, ffn)) = self.recipe, SIZES[self.options.size]
        found = {"heads": (self.shape.head_dim, head_dim), "ffn": (self.shape.ffn, ffn)}
        own = {k: recipe.consumers * (b / (a + (b - a) * share)) ** recipe.fan for k, (a, b) in found.items()}
        return {**own, "embed": recipe.embed}

    def result(self) -> dict[str, Any]:
        """Train; the losses, and what happened on the way. Paused: how far it is."""
        self.begin, schedule = time.perf_counter(), self.recipe.schedule(self.steps)
        due = dict(schedule.shares)
        for step, ids in zip(range(self.done + 1, self.steps + 1), self.windows, strict=False):
            rate, factors = self.rate(step, schedule), self.factors(schedule.share(step - 1))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * factors.get(group["group"], 1.0)
            self.totals.append(self.step(step, ids, due))
            self.done = step
            if step % max(1, self.steps // 20) == 0:
                self.curve.append(round(torch.stack(self.totals).mean().item(), 4))
                self.totals.clear()
            if step % max(1, self.steps // 8) == 0 and step < self.steps:
                self._tell(step)
            if 0 < self.options.pause < self.seconds - self.spent and step < self.steps:
                return self._paused()
        return self._finished()

    @property
    def seconds(self) -> float:
        """Seconds so far, in all sittings."""
        return self.spent + time.perf_counter() - self.begin

    def _finished(self) -> dict[str, Any]:
        seconds, weight = self.seconds, self.model.get_parameter("embed.weight")
        losses = {k: evaluate(self.model, weight, getattr(self, k)) for k in ("first", "valid", "aside")}
        driver = self.masked or self.sparse
        kept = self.shape.block_parameters * (1 - (driver.removed if driver else 0))
        for record in self.sparse.history if self.sparse is not None else ():
            self.shrinks.append({"step": record.step, "removed": record.removed, "seconds": record.seconds})
        if self.kept_at is not None:
            self.kept_at.unlink(missing_ok=True)
        return {
            **losses, "block_parameters": round(kept), "steps": self.steps, "seconds": seconds, "train": self.curve,
            "tokens_per_second": round(self.steps * self.options.batch * self.options.length / seconds),
            "shrinks": self.shrinks, "widths": self.widths(), "recipe": asdict(self.recipe),
        }  # fmt: skip

    def _tell(self, step: int) -> None:
        """Print how far it is."""
        first = evaluate(self.model, self.model.get_parameter("embed.weight"), self.first)
        told = {"progress": step, "first": round(first, 4), "train": self.curve[-1] if self.curve else None}
        print(json.dumps({**told, "seconds": round(self.seconds, 1)}), flush=True)

    # -- pauses ------------------------------------------------------------------------------------------------

    def _paused(self) -> dict[str, Any]:
        assert self.kept_at is not None
        self.kept_at.parent.mkdir(parents=True, exist_ok=True)
        partial = self.kept_at.with_suffix(".partial")
        torch.save(self.state_dict(), partial)
        partial.replace(self.kept_at)
        return {"paused": self.done, "steps": self.steps, "seconds": self.seconds, "train": self.curve}

    def state_dict(self) -> dict[str, Any]:
        """All that the steps so far have changed."""
        parts = {"masked": self.masked, "sparse": self.sparse, "model": self.model, "optimizer": self.optimizer}
        own = {k: part.state_dict() for k, part in parts.items() if part is not None}
        teacher = {} if self.teacher is None else {"teacher": self.teacher.state_dict()}
        kept = {k: getattr(self, k) for k in ("done", "curve", "totals", "shrinks", "ready")}
        same = {k: getattr(self.options, k) for k in SAME}
        return {**own, **teacher, **kept, "same": same, "spent": self.seconds, "windows": self.windows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. What shrank comes first, for the model and the optimizer to have its widths."""
        for name, before in state["same"].items():
            if before != getattr(self.options, name):
                raise SystemExit(
                    f"{self.kept_at} is of a run with {name} {before}, not {getattr(self.options, name)}: remove it"
                )
        for name in ("masked", "sparse", "model", "optimizer", "teacher", "windows"):
            part = getattr(self, name)
            if part is not None:
                part.load_state_dict(state[name])
        for name in ("done", "curve", "totals", "shrinks", "ready", "spent"):
            setattr(self, name, state[name])

    def step(self, step: int, ids: Tensor, due: dict[int, float]) -> Tensor:
        """One step of the optimizer, and what comes after it."""
        with torch.autocast("cuda", torch.bfloat16) if ids.is_cuda else nullcontext():
            loss = self._loss(ids)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        near = [s for s in due if step <= s <= step + self.options.window]
        if self.masked is not None and near:
            self.masked.gather()
        if self.sparse is not None:
            self.sparse.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masked is not None and due:
            self._after(step, due, self.masked)
        return loss.detach()

    def _loss(self, ids: Tensor) -> Tensor:
        hidden, weight = self.model(ids[:, :-1]), self.model.get_parameter("embed.weight")
        if self.teacher is None or not self.ready:
            return self.loss(hidden, weight, ids[:, 1:])
        with torch.no_grad():
            expected = self.teacher(ids[:, :-1])
        teacher = (expected, self.teacher.get_parameter("embed.weight"))
        return self.taught(hidden, weight, ids[:, 1:], teacher, self.recipe.distill)

    def _after(self, step: int, due: dict[int, float], masked: MaskedTraining) -> None:
        first, fade = min(due), self.recipe.fade
        if self.teacher is not None and step <= first:
            self._follow(step == first)
        for s, share in due.items():
            if fade and step == s - fade:
                masked.begin_fading(share)
            if fade and s - fade <= step < s:
                masked.fade()
        if step in due:
            with torch.random.fork_rng():
                self._shrink(step, due[step], masked)
            self.ready = self.ready or step == max(due)

    def _shrink(self, step: int, share: float, masked: MaskedTraining) -> None:
        part = self.aside[:64]
        before, begin = evaluate(self.model, self.model.get_parameter("embed.weight"), part), time.perf_counter()
        if self.recipe.fade:
            masked.end_fading()
        else:
            count = self.options.measured if self.recipe.compensate != "none" else 0
            source = Windows(self.windows.data, self.windows.length, 8, step)  # few at once: nothing is compiled here
            masked.shrink(share, [w for _, w in zip(range(count), source, strict=False)])
        seconds = time.perf_counter() - begin
        after = evaluate(self.model, self.model.get_parameter("embed.weight"), part)
        record = {"step": step, "removed": masked.removed, "seconds": seconds, "before": before, "after": after}
        self.shrinks.append({k: round(v, 4) for k, v in record.items()})

    @torch.no_grad()
    def _follow(self, last: bool) -> None:
        """Let the teacher be the weights before the first shrink, or their moving average."""
        assert self.teacher is not None
        if self.recipe.average:
            pairs = zip(self.teacher.parameters(), self.model.parameters(), strict=True)
            for own, new in pairs:
                own.lerp_(new, 1 - self.recipe.average)
        elif last:
            self.teacher.load_state_dict(self.model.state_dict())

    def widths(self) -> dict[str, list[int]]:
        """Units kept per layer, by kind."""
        found: dict[str, list[int]] = {}
        for selection in self.sparse.plan if self.sparse is not None else ():
            found.setdefault(selection.kind, []).append(selection.kept)
        for c in self.masked.couplings if self.masked is not None else ():
            assert self.masked is not None
            found.setdefault(c.kind, []).append(int(self.masked.keep[c.name][0].sum()))
        return found
