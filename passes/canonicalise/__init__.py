"""What makes exported graphs alike, so that one rule per operator finds what can be removed.

All of it is exact: regions are inlined, sizes are written out, and views, selections and concatenations stand in the
order in which they tie the fewest widths together.
"""

from ecospa_fx.ir.passes import Pass
from ecospa_fx.passes.canonicalise.drop_whole_slices import DropWholeSlices
from ecospa_fx.passes.canonicalise.explicit_shapes import ExplicitShapes
from ecospa_fx.passes.canonicalise.hoist_selections import HoistSelections
from ecospa_fx.passes.canonicalise.inline_regions import InlineRegions
from ecospa_fx.passes.canonicalise.read_sizes import ReadSizes
from ecospa_fx.passes.canonicalise.refuse_parameter_writes import RefuseParameterWrites
from ecospa_fx.passes.canonicalise.sink_concatenations import SinkConcatenations
from ecospa_fx.passes.canonicalise.slice_constant_indices import SliceConstantIndices

CANONICALISE: tuple[Pass, ...] = (
    InlineRegions(),
    RefuseParameterWrites(),
    DropWholeSlices(),
    ExplicitShapes(),
    SliceConstantIndices(),
    ReadSizes(),
    HoistSelections(),
    SinkConcatenations(),
)
"""What runs after every export, in this order.

Regions go first, because no other pass looks into sub-graphs: a write into a parameter may stand in one. Refusals come
next, before work is done in vain. `ExplicitShapes` leaves sizes of other tensors behind, which `ReadSizes` then reads
off the inputs. `HoistSelections` and `SinkConcatenations` come last, because they look for chains of views: a whole
slice would interrupt such a chain, and a slice that was an index by a constant may be its end.
"""
