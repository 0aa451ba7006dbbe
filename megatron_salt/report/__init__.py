"""Compares finished runs by what they wrote into `metrics.jsonl`: tables and plots in Markdown.

A baseline and any number of runs are compared at equal steps and at equal training seconds. All
numbers are printed as measured. The one derived number, the step at which a run reaches the
baseline's final held-out loss, is interpolated between two evaluations and labelled so.

`runs` reads and checks, `plots` draws, `tables` lays out, `markdown` writes.
"""

from megatron_salt.report.markdown import write_report
from megatron_salt.report.runs import RunLog, load_run, with_labels

__all__ = ["RunLog", "load_run", "with_labels", "write_report"]
