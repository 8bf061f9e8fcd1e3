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
checkpoint   orbax checkpoints, atomic and checked
mesh         layouts over devices and hosts
progress     the bar
"""

from experiments.common.training.checkpoint import CheckpointError as CheckpointError
from experiments.common.training.checkpoint import Checkpoints as Checkpoints
from experiments.common.training.config import Admm as Admm
from experiments.common.training.config import ConfigError as ConfigError
from experiments.common.training.config import Fit as Fit
from experiments.common.training.config import Plan as Plan
from experiments.common.training.config import Stage as Stage
from experiments.common.training.config import parse as parse
from experiments.common.training.job import Job as Job
from experiments.common.training.job import check_phases as check_phases
from experiments.common.training.job import like as like
from experiments.common.training.job import total_steps as total_steps
from experiments.common.training.language import language as language
from experiments.common.training.loop import Diverged as Diverged
from experiments.common.training.loop import Interrupted as Interrupted
from experiments.common.training.loop import Outcome as Outcome
from experiments.common.training.loop import train as train
from experiments.common.training.mesh import Placement as Placement
from experiments.common.training.phases import Phase as Phase
from experiments.common.training.phases import Weights as Weights
from experiments.common.training.phases import plan as plan
from experiments.common.training.progress import Display as Display
from experiments.common.training.state import Task as Task
from experiments.common.training.state import TrainState as TrainState
from experiments.common.training.state import classification as classification
