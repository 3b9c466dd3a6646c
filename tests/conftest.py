"""Test set-up: slow and nightly tests only on demand; one torch thread, as every fedpeek worker has; Ctrl-C reaches tests in the background, too."""

from __future__ import annotations

import signal

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--nightly", action="store_true", help="also run the tests marked nightly")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):  # the process that only hands out tests needs no torch
        import torch

        torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started with & or nohup; what is ignored stays so in child processes
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for kind in ("slow", "nightly"):
        if config.getoption(f"--{kind}"):
            continue
        skip = pytest.mark.skip(reason=f"{kind}; run with --{kind}")
        for item in items:
            if item.get_closest_marker(kind):
                item.add_marker(skip)
