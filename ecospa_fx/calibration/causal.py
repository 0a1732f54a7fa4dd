"""Whether a module is a causal language model of the ids that it is given: by numbers, whatever its class.

It reads token ids [rows, positions] and returns logits [rows, positions, vocabulary], of which later tokens move none.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ecospa_fx.calibration.token_call import NotCausalError, TokenCall
from ecospa_fx.importance.losses import Batch, is_floating, leaves_of
from ecospa_fx.module_modes import modes_restored, set_mode
from ecospa_fx.wrappers import unwrapped

POSITIONS = 4
"""Of the calls that find out what a model is."""


@dataclass(frozen=True, slots=True, eq=False)
class CausalModel:
    """A causal language model of token ids."""

    model: nn.Module
    """Without compiling or parallel wrappers around it."""
    call: TokenCall
    """How it is called."""
    place: int
    """Of the logits among the leaves of its output."""
    vocabulary: int
    """Logits per position."""
    valid: Tensor
    """LongTensor of the ids that it can read and predict."""
    most: int | None
    """Positions that it can read, as far as its tables of positions and its configuration say."""

    def logits(self, output: object) -> Tensor:
        """[rows, positions, vocabulary], of what the model returned."""
        logits: Tensor = leaves_of(output)[self.place]
        return logits

    def read(self, ids: Tensor) -> Tensor:
        """The logits of token ids [rows, positions]."""
        return self.logits(answer(self.model, self.call.batch(ids)))

    def length(self, wanted: int) -> int:
        """The most positions up to `wanted` that the model reads, by its tables or by trying. Runs the model."""
        most = min(wanted, self.most or wanted)
        low, high = 0, most
        while low < high:
            tried = high if low == 0 else math.ceil((low + high) / 2)
            if self._reads(tried):
                low = tried
            else:
                high, low = tried - 1, low or min(POSITIONS, tried - 1)
        return low

    def _reads(self, positions: int) -> bool:
        try:
            with evaluating(self.model):
                return self.read(self.valid[:1].expand(1, positions)).shape[:2] == (1, positions)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model says to more positions than it has
            return False


def causal_model(
    model: nn.Module, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
) -> CausalModel:
    """What a model is as a causal language model, by four small calls in evaluation mode.

    args, kwargs: example inputs with one tensor of ids [rows, positions]; by default the ids are the first argument.
    Raises NotCausalError, which says why it is none.
    """
    model = unwrapped(model)
    tensors = list(chain(model.parameters(), model.buffers()))
    if any(tensor.is_meta for tensor in tensors):
        raise NotCausalError("its weights are on meta and have no values")
    device = tensors[0].device if tensors else torch.device("cpu")
    call = TokenCall.of(args, kwargs or {}) if args or kwargs else _usual_call(model, device)
    with evaluating(model):
        return _check_causal(_probed(model, call, device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; what it returns may go where there are some."""
    with modes_restored(model), torch.inference_mode(False), torch.no_grad():
        set_mode(False, model)
        yield


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a model's call by name."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


def _usual_call(model: nn.Module, device: torch.device) -> TokenCall:
    """The ids as the first argument, and without a cache where the model makes one unless it is told not to."""
    more = {"use_cache": False} if "use_cache" in parameters_of(model) else {}
    return TokenCall.of((torch.tensor([[0, 1], [1, 1]], device=device),), more)


def answer(model: nn.Module, batch: Batch) -> object:
    """What a model returns for a batch."""
    args, kwargs = batch
    return model(*args, **kwargs)


def _probed(model: nn.Module, call: TokenCall, device: torch.device) -> CausalModel:
    """What the output for ids that every vocabulary has says. Raises NotCausalError."""
    ids = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]], device=device)
    tables = _TablesRead(model, ids)
    try:
        with tables:
            leaves = leaves_of(answer(model, call.batch(ids)))
    except Exception as error:  # the user's own code
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), ''):.200}"
        raise NotCausalError(f"it fails on token ids [2, {POSITIONS}] ({reason})") from error
    floating = {place: leaf.shape for place, leaf in enumerate(leaves) if is_floating(leaf) and leaf.dim() == 3}
    sizes = {place: shape[2] for place, shape in floating.items() if shape[:2] == ids.shape}
    if not sizes:
        raise NotCausalError("its output holds no floating logits [rows, positions, vocabulary] of the ids")
    rows = tables.ids
    place, size = max(sizes.items(), key=lambda pair: (pair[1] == rows, pair[1]))
    if rows is not None and size <= rows / 2:
        raise NotCausalError(f"its output has {size:,} classes and it reads {rows:,} ids, so that it predicts no ids")
    config = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    limits = [most for most in (tables.positions, config) if isinstance(most, int) and most > 0]
    valid = leaves[place].isfinite().all(0).all(0)[:rows].nonzero().flatten()
    return CausalModel(model, call, place, size, valid, min(limits, default=None))


def _check_causal(causal: CausalModel) -> CausalModel:
    """The same model, if it is causal. Raises NotCausalError where later tokens move earlier logits, or none do."""
    valid = causal.valid
    if len(valid) < 2:
        usable = "only one" if len(valid) else "none"
        raise NotCausalError(
            f"{usable} of the {causal.vocabulary:,} ids that it predicts can be read and has finite logits"
        )
    picked = torch.linspace(0, len(valid) - 1, POSITIONS).long()
    row, other = valid[picked], valid[picked.flip(0)]
    other = torch.where(other == row, valid[(picked + 1) % len(valid)], other)
    steps = torch.arange(POSITIONS, device=row.device)
    later = steps >= steps[:, None]  # row t: the positions from t on, which hold other ids there
    logits = causal.read(torch.cat([row[None], torch.where(later, other, row)]))[..., valid]
    if not logits.isfinite().all():
        raise NotCausalError("its logits are not finite")
    moved = (logits[1:] - logits[:1]).abs().amax(-1)
    most = moved[later].amax()
    if not most > 0:
        raise NotCausalError("its logits do not depend on the ids")
    if moved[~later].amax() > math.sqrt(torch.finfo(logits.dtype).eps) * most:
        raise NotCausalError("later tokens move earlier logits, so that it is not causal")
    return causal


class _TablesRead(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch annotates no modes
    """How many rows the stored matrices have that are read by ids, and by numbers of positions.

    Numbers beyond would be out of range, which is not tried because an accelerator does not survive it.
    """

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ids: int | None = None
        self.positions: int | None = None
        stored = [t for t in chain(model.parameters(), model.buffers()) if t.dim() == 2]
        self._stored = {t.untyped_storage().data_ptr() for t in stored if t.layout is torch.strided}
        self._read = ids

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
        tables = [t for t in tensors if self._is_table(t)]
        for numbers in tensors if tables else ():
            if numbers.dtype in (torch.int64, torch.int32):
                self._note(numbers, min(len(table) for table in tables))
        return func(*args, **(kwargs or {}))

    def _is_table(self, tensor: Tensor) -> bool:
        if tensor.dim() != 2 or not tensor.is_floating_point() or tensor.layout is not torch.strided:
            return False
        return tensor.untyped_storage().data_ptr() in self._stored

    def _note(self, numbers: Tensor, rows: int) -> None:
        if numbers.shape == self._read.shape and bool((numbers == self._read).all()):
            self.ids = min(self.ids or rows, rows)
        elif numbers.shape[-1] == POSITIONS and bool((numbers.diff(dim=-1) == 1).all()):
            most = rows - int(numbers.amin())
            self.positions = min(self.positions or most, most)
