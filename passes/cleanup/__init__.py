"""What makes a smaller graph fast and tidy: masks and repeated keys become flags, nodes without effect go."""

from ecospa_fx.ir.passes import Pass
from ecospa_fx.passes.cleanup.causal_attention import CausalAttention
from ecospa_fx.passes.cleanup.equal_widths import EqualWidths
from ecospa_fx.passes.cleanup.grouped_attention import GroupedAttention
from ecospa_fx.passes.cleanup.remove_inert import RemoveInert

CLEANUP: tuple[Pass, ...] = (CausalAttention(), GroupedAttention(), EqualWidths(), RemoveInert())
"""What `shrink` runs after the couplings are cut, in this order.

Masks go before groups, because only attention without a mask takes groups; what they leave behind goes last.
"""

TRAINING_CLEANUP: tuple[Pass, ...] = (CausalAttention(), GroupedAttention(), RemoveInert(casts=False))
"""What training in graph form runs after every shrink: the same, but for casts, which autocast may need."""
