"""How long a run takes: told before, while it goes on, and by what it was told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdrecipe.jobs.forecast import Forecast, span_s
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.run import Run
from kdrecipe.jobs.stamps import Job
from kdrecipe.stages.timing import outlook, published, seconds_before


def job(name: str, *needs: str, stage: int = 5, alone: bool = False) -> Job:
    return Job(stage, name, Path("exp") / name, {}, lambda out: None, needs, alone=alone)


TEACHER = job("teacher/seed1", stage=3)
STUDENTS = [job(f"kd/seed{k}", "teacher/seed1") for k in (1, 2, 3)]
DECODE = job("decode/kd", *(s.name for s in STUDENTS), stage=8, alone=True)
JOBS = [TEACHER, *STUDENTS, DECODE]
SECONDS = {"teacher/seed1": 600.0, "kd/seed1": 120.0, "kd/seed2": 120.0, "kd/seed3": 120.0, "decode/kd": 60.0}


@pytest.mark.parametrize(("num_jobs", "expected"), [(1, 1020.0), (2, 900.0), (8, 780.0)])
def test_jobs_side_by_side_take_less_time_but_wait_for_each_other(num_jobs, expected):
    assert span_s(JOBS, SECONDS, num_jobs) == expected


def test_a_job_that_is_alone_waits_for_all_others():
    jobs = [job("a"), job("measure", alone=True), job("b")]
    assert span_s(jobs, {"a": 10, "measure": 5, "b": 7}, 2) == 22


def test_the_estimate_follows_the_run():
    forecast = Forecast(JOBS, SECONDS, 1)
    assert forecast.text() == "about 17 min"
    forecast.done(TEACHER, 1200.0)  # twice as long as before
    assert forecast.progress == "1 of 5 jobs done, about 14 min left"
    for student in STUDENTS:
        forecast.done(student, None)
    assert forecast.progress == "4 of 5 jobs done, about 2 min left"
    forecast.done(DECODE, 1.0)
    assert forecast.progress == "5 of 5 jobs done"


def test_what_is_not_known_is_not_guessed():
    some = Forecast(JOBS, {"teacher/seed1": 600.0})
    assert some.text() == "at least 10 min"
    jobs = "5 jobs to run (teacher 1, distill 3, decode 1)"
    assert outlook(some) == f"{jobs}: at least 10 min, by what such jobs took before"
    none = Forecast(JOBS, {})
    assert none.progress == "0 of 5 jobs done"
    assert outlook(none) == f"{jobs}; how long they take is not known: training will tell what it has left"
    assert outlook(Forecast([DECODE], {})) == "1 job to run (decode 1); how long they take is not known"


def test_times_are_those_of_stamps_or_else_of_the_committed_table(tmp_path):
    results = {
        "systems": [
            {"name": "kd", "seeds": [1, 2], "train": {"by_seed": [{"seconds": 30.0}, {"seconds": 40.0}]}},
            {"name": "kd_int8", "seeds": [1, 2], "train": None},
        ]
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert published(tmp_path / "results.json") == {"kd/seed1": 30.0, "kd/seed2": 40.0}
    results["seconds"] = {"kd/seed1": 31.0, "decode/kd": 5.0, "prepare": None}  # its stamp had no time
    (tmp_path / "results.json").write_text(json.dumps(results))
    stamped = Job(5, "kd/seed2", tmp_path / "kd", {}, lambda out: None)
    stamped.out.mkdir()
    stamp = {"inputs": {"old": 1}, "needs": {}, "content": "x", "files": {}, "seconds": 44.0}
    stamped.stamp.write_text(json.dumps(stamp))
    plan = Plan()
    plan.add(stamped)
    recipe = SimpleNamespace(dir=tmp_path, as_it_stands=True)
    assert seconds_before(recipe, plan) == {"kd/seed1": 31.0, "kd/seed2": 44.0, "decode/kd": 5.0}
    changed = SimpleNamespace(dir=tmp_path, as_it_stands=False)
    assert seconds_before(changed, plan) == {"kd/seed2": 44.0}, "another recipe takes another time"


@pytest.mark.parametrize("content", ["", "[]", '{"systems": [{}]}', '{"systems": 3}'])
def test_a_table_that_can_t_be_read_tells_nothing(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert published(tmp_path / "results.json") == {}
    assert published(tmp_path / "absent.json") == {}


def test_a_run_tells_what_is_left(tmp_path, capsys):
    plan = Plan()
    for name in "ab":
        plan.add(Job(0, name, tmp_path / name, {}, lambda out: None))
    jobs = list(plan.jobs.values())
    forecast = Forecast(jobs, {"a": 1.0, "b": 90.0})
    Run(plan, jobs, plan.reasons(jobs), ["prepare"], lambda job: [], forecast=forecast).run()
    said = capsys.readouterr().out
    assert "; 1 of 2 jobs done, about 90 s left" in said
    assert "; 2 of 2 jobs done\n" in said
