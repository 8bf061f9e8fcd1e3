"""Post-training reconstruction: weights of any set whose outputs on a calibration set are nearest to the dense ones."""

from compressx.reconstruction.distill import Distilled, distill
from compressx.reconstruction.metric import project_in_metric
from compressx.reconstruction.reconstruct import reconstruct
from compressx.reconstruction.report import Layer, Report
from compressx.reconstruction.settings import Settings
from compressx.reconstruction.solve import Solution, TooFewRows, solve, solve_joint
from compressx.reconstruction.statistics import match_statistics

__all__ = [
    "Distilled",
    "Layer",
    "Report",
    "Settings",
    "Solution",
    "TooFewRows",
    "distill",
    "match_statistics",
    "project_in_metric",
    "reconstruct",
    "solve",
    "solve_joint",
]
