"""Settings of the layer solver; which data stand behind each value is in docs/post_training.md."""

from dataclasses import dataclass

INTERSECTIONS = ("chain", "each", "best")


@dataclass(frozen=True)
class Settings:
    """How the layer solver runs; the defaults are the ones to use.

    Attributes:
      rho: penalty of the first iteration, in coordinates in which H has a unit diagonal.
      ramp: factor by which rho grows every iteration.
      steps: iterations at most.
      tolerance: |W - Z| / |W| at which it stops.
      damp: share of the mean diagonal of H that is added to it.
      refresh_every: iterations between two choices of a set's structure; signs are chosen anew in every one.
      intersections: "chain", one Z projected onto the sets in turn; "each", a Z and a U for every set; "best" tries
        both, where no set is one of levels, which a Z for each set serves badly.
      refit_steps: iterations at most of the refit on the frozen set.
      sweeps: rounds of coordinate descent over levels and scale.

    Example:
      >>> Settings(ramp=1.02).steps
      200
    """

    rho: float = 0.03
    ramp: float = 1.05
    steps: int = 200
    tolerance: float = 1e-3
    damp: float = 0.01
    refresh_every: int = 5
    intersections: str = "best"
    refit_steps: int = 100
    sweeps: int = 3

    def __post_init__(self) -> None:
        for name in ("rho", "tolerance", "damp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.ramp < 1:
            raise ValueError(f"ramp must be at least 1, got {self.ramp}")
        for name in ("steps", "refresh_every", "refit_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sweeps < 0:
            raise ValueError(f"sweeps must be at least 0, got {self.sweeps}")
        if self.intersections not in INTERSECTIONS:
            raise ValueError(f"intersections must be one of {', '.join(INTERSECTIONS)}, got {self.intersections!r}")
