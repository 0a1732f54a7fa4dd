"""Graph passes: graph in, graph out, one file each."""

if __name__ != "ecospa_fx.passes":
    raise ImportError("the folder passes/ is installed as ecospa_fx.passes; import it by that name")

from ecospa_fx.ir.passes import Pass as Pass
from ecospa_fx.ir.passes import PassResult as PassResult
from ecospa_fx.ir.passes import run_passes as run_passes
from ecospa_fx.passes.cleanup.causal_attention import CausalAttention as CausalAttention
from ecospa_fx.passes.cleanup.equal_widths import EqualWidths as EqualWidths
from ecospa_fx.passes.cleanup.follow_mode import FollowMode as FollowMode
from ecospa_fx.passes.cleanup.grouped_attention import GroupedAttention as GroupedAttention
from ecospa_fx.passes.cleanup.remove_inert import RemoveInert as RemoveInert
from ecospa_fx.passes.shrink.shrink_couplings import ShrinkCouplings as ShrinkCouplings

CLEANUP: tuple[Pass, ...] = (CausalAttention(), GroupedAttention(), EqualWidths(), RemoveInert())
"""What `shrink` runs after the couplings are cut, in this order.

Masks go before groups, because only attention without a mask takes groups; what they leave behind goes last.
"""

TRAINING_CLEANUP: tuple[Pass, ...] = (CausalAttention(), GroupedAttention(), RemoveInert(casts=False))
"""What training in graph form runs after every shrink: the same, but for casts, which autocast may need."""
