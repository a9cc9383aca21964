"""A pytest plugin for the campaign: what is left out is named, and what fails is told at once.

A test file that needs a module which is not here is left out. Only modules that the campaign knows somebody may lack
count, so that a slip in an import stays an error. A failure is printed when it happens: a run that its limit ends would
otherwise never have told it.
"""

from __future__ import annotations

import re

import pytest
from campaign import MISSED, NEEDS, is_missing

# what the tests alone import, besides
KNOWN = {*MISSED, *(module for needs in NEEDS.values() for module in needs), "accelerate", "tensorboard"}


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    found = re.search(r"No module named '(\w+)|import of (\w+) halted", str(report.longrepr)) if report.failed else None
    module = found and (found[1] or found[2])
    if module in KNOWN and is_missing(module):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"left out for want of {module}")
    return report


def pytest_collection_modifyitems(items):
    # CUDA graphs of steps: no device has run them since they share one stream
    items.sort(key=lambda item: item.path.parent.name not in ("solver", "train"))


def pytest_runtest_logreport(report):
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{report.longreprtext}", flush=True)
