"""Tasks: examples, templates, metrics, and where they come from."""

from deltatune.tasks.example import Example
from deltatune.tasks.loaders import hub_names, task, task_names
from deltatune.tasks.metrics import METRICS, score
from deltatune.tasks.task import Task
from deltatune.tasks.template import Prompt, Template

__all__ = ["METRICS", "Example", "Prompt", "Task", "Template", "hub_names", "score", "task", "task_names"]
