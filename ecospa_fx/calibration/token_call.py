"""Calls of a model on other token ids than those of its example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.losses import Batch

Role = Literal["ids", "mask", "zeros", "positions"]
"""What a tensor [rows, positions] holds: the ids, as labels do too; ones where a token counts; zeros; or positions."""


class NotCausalError(Exception):
    """A model that is no causal language model of the ids that it is given; the message says why."""


@dataclass(frozen=True, slots=True)
class TokenCall:
    """A call with one tensor of token ids [rows, positions], and what goes along with it.

    Tensors of the same shape follow the ids: see `Role`. All else is passed as it is in the example.
    """

    leaves: tuple[object, ...]
    """Of (args, kwargs) of the example."""
    spec: pytree.TreeSpec
    """Of (args, kwargs)."""
    place: int
    """Of the ids among the leaves."""
    roles: Mapping[int, Role]
    """By place, of the tensors that follow the ids; the ids are among them."""

    @classmethod
    def of(cls, args: Sequence[object], kwargs: Mapping[str, object]) -> TokenCall:
        """The call of which this is an example. Raises NotCausalError where it is unclear what the ids are."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        whole = {place: leaf for place, leaf in enumerate(leaves) if _is_whole(leaf)}
        if len(whole) > 1:
            whole = {place: leaf for place, leaf in whole.items() if _role_without_ids(leaf) is None}
            whole = {place: leaf for place, leaf in whole.items() if not bool((leaf < 0).any())}
        places = [p for p in whole if not any(q < p and whole[q].equal(whole[p]) for q in whole)]
        if len(places) != 1:
            raise NotCausalError(
                f"its example inputs hold {len(places) or 'no'} tensors of token ids [rows, positions], not exactly one"
            )
        ids = whole[places[0]]
        beside = {p: leaf for p, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape == ids.shape}
        return cls(tuple(leaves), spec, places[0], {place: _role(leaf, ids) for place, leaf in beside.items()})

    def batch(self, ids: Tensor, past: int = 0) -> Batch:
        """(args, kwargs) for token ids [rows, positions], of which `past` more positions were read before."""
        rows, positions = ids.shape
        size = {"mask": (rows, past + positions), "zeros": (rows, positions)}

        def follow(leaf: Tensor, role: Role) -> Tensor:
            if role == "ids":
                return ids.to(leaf)
            if role == "positions":
                return torch.arange(past, past + positions).expand(rows, -1).to(leaf)
            return torch.full(size[role], int(role == "mask")).to(leaf)

        leaves = list(self.leaves)
        for place, role in self.roles.items():
            leaf = leaves[place]
            assert isinstance(leaf, Tensor)
            leaves[place] = follow(leaf, role)
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def tokens(self, args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[Tensor, Tensor]:
        """(ids, counted) of a call, both [rows, positions]; counted: where every mask says that there is a token.

        Raises ScoreError for a call of another structure.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        ids = leaves[self.place] if spec == self.spec else None
        if not _is_whole(ids):
            raise ScoreError(
                "batches differ in their structure, so that the token ids are not in the same place in all of them: "
                "pass all in the same arguments"
            )
        counted = torch.ones_like(ids, dtype=torch.bool)
        for place, role in self.roles.items():
            if role == "mask" and leaves[place].shape == ids.shape:
                counted &= leaves[place] != 0
        return ids, counted


def _is_whole(leaf: object) -> TypeGuard[Tensor]:
    """Whether a leaf may be token ids."""
    if not isinstance(leaf, Tensor) or leaf.dim() != 2 or leaf.numel() == 0 or leaf.is_meta:
        return False
    return not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)


def _role_without_ids(leaf: Tensor) -> Role | None:
    """What a tensor [rows, positions] holds that are no ids; None where they may be."""
    if not leaf.any():
        return "zeros"
    if leaf.equal(torch.arange(leaf.shape[1]).expand(leaf.shape).to(leaf)):
        return "positions"
    return "mask" if bool(((leaf == 0) | (leaf == 1)).all()) else None


def _role(leaf: Tensor, ids: Tensor) -> Role:
    """What a tensor of the ids' shape holds. Raises NotCausalError where that is not known."""
    if leaf is ids or bool(((leaf == ids) | (leaf < 0)).all()):
        return "ids"
    role = _role_without_ids(leaf)
    if role is None:
        raise NotCausalError("its example inputs hold a tensor beside the ids of which it is not known how it follows")
    return role
