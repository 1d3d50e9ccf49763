"""Training: `fit` a task (what is frozen, what is lost) over a dataset, by a published recipe or your own options."""

from blip2.train.loop import Dataset, FitOptions, FitResult, Task, fit
from blip2.train.record import TrainingError

__all__ = ["Dataset", "FitOptions", "FitResult", "Task", "TrainingError", "fit"]
