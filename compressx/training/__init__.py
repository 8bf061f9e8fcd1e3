"""Training: the phases dense -> admm -> harden -> retrain, resumable to the bit, on one device or many.

config       Fit, Admm, Stage, Plan: a run as frozen dataclasses; `parse` reads them strictly
state        TrainState, Task, one step, the runner that is fastest on the backend, evaluation
optimizers   learning-rate schedules and the optax chain of each kind of phase
phases       the phases of a plan; hardening
job          what is trained on what: the order of examples, keys, layouts
gradual      gradual magnitude pruning, for comparison
libraries    the pattern libraries of a run, and what is logged of them
language     the task of language models: carried state, exact perplexity, sampling
loop         `train`: epochs, records, checkpoints, resuming
together     `train_together`: several seeds as one program
checkpoint   orbax checkpoints, atomic and checked
mesh         layouts over devices and hosts
progress     the bar
"""

from compressx.training.checkpoint import CheckpointError as CheckpointError
from compressx.training.checkpoint import Checkpoints as Checkpoints
from compressx.training.config import Admm as Admm
from compressx.training.config import ConfigError as ConfigError
from compressx.training.config import Fit as Fit
from compressx.training.config import Plan as Plan
from compressx.training.config import Stage as Stage
from compressx.training.config import parse as parse
from compressx.training.job import Job as Job
from compressx.training.job import check_phases as check_phases
from compressx.training.job import like as like
from compressx.training.job import total_steps as total_steps
from compressx.training.language import language as language
from compressx.training.loop import Diverged as Diverged
from compressx.training.loop import Outcome as Outcome
from compressx.training.loop import train as train
from compressx.training.mesh import Placement as Placement
from compressx.training.phases import Phase as Phase
from compressx.training.phases import Weights as Weights
from compressx.training.phases import plan as plan
from compressx.training.progress import Display as Display
from compressx.training.state import Task as Task
from compressx.training.state import TrainState as TrainState
from compressx.training.state import classification as classification
from compressx.training.together import train_together as train_together
