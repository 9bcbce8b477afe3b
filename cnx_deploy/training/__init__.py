"""Training and fine-tuning: the recipe, the files of a run, and the loop on Lightning."""

from cnx_deploy.training.launch import Launch, launch_from_environment
from cnx_deploy.training.recipes import RECIPES, recipe_options, spec_from_recipe
from cnx_deploy.training.records import EpochRecord, Progress, Silence, StepReport, TrainingResult
from cnx_deploy.training.run import initial_model, train
from cnx_deploy.training.spec import TrainingSpec

__all__ = [
    "RECIPES",
    "EpochRecord",
    "Launch",
    "Progress",
    "Silence",
    "StepReport",
    "TrainingResult",
    "TrainingSpec",
    "initial_model",
    "launch_from_environment",
    "recipe_options",
    "spec_from_recipe",
    "train",
]
