"""Studies: many runs from one plan, done by several processes, and a report that says what they show."""

from deltatune.study.executors import run_study
from deltatune.study.plan import Plan
from deltatune.study.report import report
from deltatune.study.status import Status, status

__all__ = ["Plan", "Status", "report", "run_study", "status"]
