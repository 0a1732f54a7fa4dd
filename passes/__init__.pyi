"""The public names, for editors and type checkers; see ``__init__.py``."""

from ecospa_fx.ir.passes import Pass as Pass
from ecospa_fx.ir.passes import PassResult as PassResult
from ecospa_fx.ir.passes import run_passes as run_passes
from ecospa_fx.passes.cleanup import CLEANUP as CLEANUP
from ecospa_fx.passes.cleanup import TRAINING_CLEANUP as TRAINING_CLEANUP
from ecospa_fx.passes.cleanup.causal_attention import CausalAttention as CausalAttention
from ecospa_fx.passes.cleanup.equal_widths import EqualWidths as EqualWidths
from ecospa_fx.passes.cleanup.follow_mode import FollowMode as FollowMode
from ecospa_fx.passes.cleanup.grouped_attention import GroupedAttention as GroupedAttention
from ecospa_fx.passes.cleanup.remove_inert import RemoveInert as RemoveInert
from ecospa_fx.passes.shrink.shrink_couplings import ShrinkCouplings as ShrinkCouplings
