"""Training: `fit` a task (what is trained, on which loss) over a dataset, by a published recipe or your own options."""

from blip2.train.loop import Dataset, FitOptions, FitResult, Task, fit
from blip2.train.metrics import TrainingError

__all__ = ["Dataset", "FitOptions", "FitResult", "Task", "TrainingError", "fit"]
