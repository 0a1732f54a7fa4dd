"""The public names, for editors and type checkers; see ``__init__.py``."""

from ecospa_fx import passes as passes
from ecospa_fx.api import compress as compress
from ecospa_fx.api import compress_ as compress_
from ecospa_fx.api import detect as detect
from ecospa_fx.api import shrink as shrink
from ecospa_fx.axes.registry import axis_rule as axis_rule
from ecospa_fx.export.verb import export as export
from ecospa_fx.importance.score import score as score
from ecospa_fx.importance.scores import Scores as Scores
from ecospa_fx.inplace.shrink import shrink_ as shrink_
from ecospa_fx.plan import Plan as Plan
from ecospa_fx.plan import Selection as Selection
from ecospa_fx.planning import plan as plan
from ecospa_fx.report.verb import report as report
from ecospa_fx.storage.models import load as load
from ecospa_fx.storage.models import save as save
from ecospa_fx.torch_compile import backend as backend
from ecospa_fx.training.schedule import AtStart as AtStart
from ecospa_fx.training.schedule import Constant as Constant
from ecospa_fx.training.schedule import Cubic as Cubic
from ecospa_fx.training.schedule import Linear as Linear
from ecospa_fx.training.schedule import OneShot as OneShot
from ecospa_fx.training.sparse import SparseTraining as SparseTraining
from ecospa_fx.version import __version__ as __version__
