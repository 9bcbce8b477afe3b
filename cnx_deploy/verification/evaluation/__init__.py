"""How good a runner is on labelled images: the same images and counting for every backend."""

from cnx_deploy.verification.evaluation.calibration import Calibration, CalibrationBin
from cnx_deploy.verification.evaluation.outcomes import Outcome, PredictionWriter
from cnx_deploy.verification.evaluation.results import ClassResult, ConfusionCell, Evaluation
from cnx_deploy.verification.evaluation.run import evaluate

__all__ = [
    "Calibration",
    "CalibrationBin",
    "ClassResult",
    "ConfusionCell",
    "Evaluation",
    "Outcome",
    "PredictionWriter",
    "evaluate",
]
