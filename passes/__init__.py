"""Graph passes: graph in, graph out, one file each."""

if __name__ != "ecospa_fx.passes":
    raise ImportError("the folder passes/ is installed as ecospa_fx.passes; import it by that name")

from ecospa_fx.passes.shrink_couplings import ShrinkCouplings as ShrinkCouplings
