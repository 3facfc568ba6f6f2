"""Memory for features and targets: one budget for a machine, shared among its processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from kdrecipe.data import memory
from kdrecipe.data.memory import Kept, MemoryBudget, available_bytes, machine_budget, num_processes
from kdrecipe.errors import KdrecipeError
from kdrecipe.jobs.executors import Processes


def test_what_does_not_fit_is_not_kept():
    budget = MemoryBudget(100)
    one, two = Kept(budget), Kept(budget)
    one.offer("a", 1, 60)
    two.offer("b", 2, 60)
    two.offer("c", 3, 40)
    assert (one.get("a"), two.get("b"), two.get("c"), budget.left) == (1, None, 3, 0)
    assert (len(one), len(two)) == (1, 1)


def test_memory_is_free_again_when_its_user_goes():
    budget = MemoryBudget(100)
    kept = Kept(budget)
    kept.offer("a", np.zeros(1), 60)
    assert budget.left == 40
    del kept
    gc.collect()
    assert budget.left == 100


def test_the_budget_of_a_machine():
    assert machine_budget({"KDRECIPE_CACHE_GB": "1.5"}) == 1_500_000_000
    assert machine_budget({"KDRECIPE_CACHE_GB": "0"}) == 0
    assert machine_budget({}) == pytest.approx(available_bytes() / 2, rel=0.2)
    assert 0 < available_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for wrong in ("much", "-1", "nan", "inf"):
        with pytest.raises(KdrecipeError, match="KDRECIPE_CACHE_GB"):
            machine_budget({"KDRECIPE_CACHE_GB": wrong})


@pytest.mark.parametrize(
    ("env", "number"),
    [
        ({}, 1),
        ({"KDRECIPE_PROCESSES": "8"}, 8),
        ({"KDRECIPE_PROCESSES": "2", "LOCAL_WORLD_SIZE": "4"}, 8),
        ({"KDRECIPE_PROCESSES": "no"}, 1),
    ],
)
def test_processes_side_by_side_share_it(env, number):
    assert num_processes(env) == number


def test_a_process_has_its_share():
    code = "from kdrecipe.data.memory import process_budget; print(process_budget().left)"
    env = {**os.environ, "KDRECIPE_CACHE_GB": "6", "KDRECIPE_PROCESSES": "8"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 750_000_000


def test_jobs_side_by_side_are_told_what_they_share():
    said = []
    processes = Processes(4, lambda name, line: said.append(line), cache_bytes=8 * 10**9)
    code = "from kdrecipe.data.memory import process_budget; print(process_budget().left)"
    processes.start("job", [sys.executable, "-c", code])
    while not processes.finished():
        time.sleep(0.05)
    assert said == ["2000000000"]


def test_the_limit_of_a_container_counts(tmp_path):
    assert list(memory._group_limits(tmp_path)) == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert list(memory._group_limits(tmp_path)) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert list(memory._group_limits(tmp_path)) == [700]
