"""compressx: a JAX toolkit for researchers who compress neural networks for real hardware."""

from compressx import constraints as constraints
from compressx import schedules as rho
from compressx import views as views
from compressx._admm import AdmmState as AdmmState
from compressx._admm import admm as admm
from compressx._admm import find_state as find_admm_state
from compressx._admm import metrics as admm_metrics
from compressx._harden import ConstraintViolation as ConstraintViolation
from compressx._harden import check as check
from compressx._harden import count_violations as count_violations
from compressx._harden import harden as harden
from compressx._harden import structures as structures
from compressx._retrain import RetrainState as RetrainState
from compressx._retrain import retract as retract
from compressx._retrain import retrain as retrain
from compressx.constraints import *  # noqa: F403  (the factories are listed in constraints.__all__)
from compressx.formats import load_model as load_model
from compressx.formats import save_model as save_model
from compressx.kernels import Compiled as Compiled
from compressx.kernels import compile as compile
from compressx.native.memory import keep_memory as keep_memory
from compressx.rules import Bound as Bound
from compressx.rules import resolve as resolve

__version__ = "0.1.0"
