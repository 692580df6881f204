"""What every test shares: fixed seeds, one thread for tiny tensors, reproducible property tests."""

import os
import random
from collections import defaultdict
from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest
import torch

# No test may reach for a model hub; what is needed is built on the spot.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Where the test runner is root (a container), Chromium and pip are quiet about it.
os.environ.setdefault("PIP_ROOT_USER_ACTION", "ignore")

torch.set_num_threads(1)

# The same examples on every machine and every run: a red test is red for everybody. Timing is no
# part of a property, hence no deadline.
hypothesis.settings.register_profile("book", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("book")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


# What came of each test so far, without its parameters: test_claims.py asks whether the evidence
# for a claim has passed, and therefore runs last.
OUTCOMES = pytest.StashKey[dict[str, set[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = defaultdict(set)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        item.config.stash[OUTCOMES][item.nodeid.partition("[")[0]].add(report.outcome)
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name == "test_the_evidence_passes")


@pytest.fixture
def outcomes(pytestconfig: pytest.Config) -> dict[str, set[str]]:
    """Outcomes of the tests that ran before this one, by path::name."""
    return dict(pytestconfig.stash[OUTCOMES])


@pytest.fixture
def unchecked():
    """Without the type checks that only tests have, to see what a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
