"""What all tests have in common."""

import signal

import pytest
from helpers import BASELINES

# What these ask of every script is, but for the layer, of code that twins share word for word (test_scripts_agree.py):
# the README's command asks the ACPG scripts, .ci/run the baselines too.
SHARED_CODE = {"test_bad_input", "test_environments", "test_images", "test_probes", "test_resume", "test_runs"}
SHARED_CODE |= {"test_senseless_input"}

# What tests start hears these signals, even where pytest runs in the background or under nohup
for name in ("SIGHUP", "SIGINT"):
    if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if item.module.__name__ in SHARED_CODE and {params.get("script"), params.get("program")} & set(BASELINES):
            item.add_marker(pytest.mark.slow)
