# SPDX-License-Identifier: MPL-2.0
"""Makes hookshot.py importable, and a missing part a failure where all parts are promised (CI=true)."""

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that: they could not be
# interrupted even by a test that means to.
signal.signal(signal.SIGINT, signal.default_int_handler)

MISSING = "Skipped: missing:"   # What pytest.skip("missing: NAME ...") leaves in the report.


def fail_if_missing(report):
    """Turn a skip for want of a part into a failure; other skips, and xfail, stay as they are."""
    if os.environ.get("CI") == "true" and report.skipped and isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        if reason.startswith(MISSING):
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: {reason.removeprefix('Skipped: ')} (CI=true: this may not be skipped)"


# hookwrapper rather than wrapper: Debian 12 has pytest 7.2.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    fail_if_missing((yield).get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report():
    fail_if_missing((yield).get_result())
