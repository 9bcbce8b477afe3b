"""Training and fine-tuning: the recipes, the files of a run, and the loop on Lightning."""

from cnx_deploy.training.class_balance import balance_lines
from cnx_deploy.training.distributed import Launch, launch_from_environment
from cnx_deploy.training.recipes import RECIPES, recipe_options, spec_from_recipe
from cnx_deploy.training.records import (
    DetectionRecord,
    EpochRecord,
    MultiLabelRecord,
    Progress,
    RunResult,
    SegmentationRecord,
    StepReport,
    TrainingRecord,
    TrainingResult,
)
from cnx_deploy.training.run import find_training_images, initial_model, started_from, train
from cnx_deploy.training.run_folder import check_new
from cnx_deploy.training.spec import RunSpec, TrainingSpec

__all__ = [
    "RECIPES",
    "DetectionRecord",
    "EpochRecord",
    "Launch",
    "MultiLabelRecord",
    "Progress",
    "RunResult",
    "RunSpec",
    "SegmentationRecord",
    "StepReport",
    "TrainingRecord",
    "TrainingResult",
    "TrainingSpec",
    "balance_lines",
    "check_new",
    "find_training_images",
    "initial_model",
    "launch_from_environment",
    "recipe_options",
    "spec_from_recipe",
    "started_from",
    "train",
]
