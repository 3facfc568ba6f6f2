"""Jobs in processes of this machine, in Slurm's queue, on Dask's workers: each done once, whoever dies."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from executor_toys import toy_plan

from kdrecipe.cli.main import main
from kdrecipe.errors import KdrecipeError, RecipeError, TrainingError
from kdrecipe.jobs import watch
from kdrecipe.jobs.executors import Processes
from kdrecipe.jobs.run import Run
from kdrecipe.jobs.stamps import run_job
from kdrecipe.recipe.executor import DaskOptions, SlurmOptions, load_executor, split_overrides
from kdrecipe.stages import STAGES

SCRIPT = str(Path(__file__).with_name("executor_toys.py"))
VERBS = [verb for verb, _ in STAGES]


def local(root, relay):
    return Processes(2, relay)


def slurm(root, relay):
    pytest.importorskip("submitit")
    from kdrecipe.jobs.slurm import SlurmJobs

    return SlurmJobs(SlurmOptions(cluster="local"), root, relay)


def dask(root, relay):
    pytest.importorskip("distributed")
    from kdrecipe.jobs.dask import DaskTasks

    return DaskTasks(DaskOptions(), 2, root, relay)


def run(root: Path, make, victim: str) -> None:
    plan = toy_plan(root, victim)
    jobs = list(plan.jobs.values())
    reasons = dict.fromkeys(plan.jobs, "no finished output")

    def command(job):
        return [sys.executable, SCRIPT, str(root), job.name, victim]

    Run(plan, jobs, reasons, VERBS, command, 2, executor=lambda relay: make(root, relay), root=root).run()


def outputs(root: Path) -> dict[str, bytes]:
    return {name: (root / name / "text").read_bytes() for name in ("one", "two", "three", "all")}


@pytest.mark.parametrize(("make", "victim"), [(local, "itself"), (slurm, "worker"), (dask, "worker")])
def test_what_a_killed_worker_did_is_done_again_and_nothing_twice(make, victim, tmp_path, capfd):
    serial, root = tmp_path / "serial", tmp_path / "root"
    serial.mkdir()
    root.mkdir()
    for job in (plan := toy_plan(serial)).jobs.values():
        run_job(job, plan.jobs)
    run(root, make, victim)
    assert outputs(root) == outputs(serial)
    ran = (root / "ran").read_text().splitlines()
    assert sorted(line for line in ran if line.startswith("end")) == [
        "end all",
        "end one",
        "end three",
        "end two",
    ]
    assert ran.count("begin two") == 2
    assert "[two] begins two" in capfd.readouterr().out
    state = json.loads((root / watch.RUN_FILE).read_text())
    assert state["ended"]
    assert {job["state"] for job in state["jobs"].values()} == {"done"}


def test_a_job_that_fails_is_not_tried_again(tmp_path, capfd):
    plan = toy_plan(tmp_path)
    job = plan.jobs["one"]

    def command(job):
        return [sys.executable, "-c", "import sys; print('bad luck'); sys.exit(1)"]

    with pytest.raises(TrainingError, match="failed: one"):
        Run(plan, [job], {"one": "x"}, VERBS, command, 2, root=tmp_path).run()
    assert capfd.readouterr().out.count("bad luck") == 1


def test_a_worker_that_is_always_killed_is_given_up(tmp_path, capfd):
    plan = toy_plan(tmp_path)

    def command(job):
        return [sys.executable, "-c", "import os; print('tried', flush=True); os.kill(os.getpid(), 9)"]

    with pytest.raises(TrainingError, match="failed: one"):
        Run(plan, [plan.jobs["one"]], {"one": "x"}, VERBS, command, 2).run()
    said = capfd.readouterr().out
    assert said.count("tried") == 3
    assert "FAILED (killed by signal 9)" in said


def test_a_job_that_was_given_out_twice_is_found_finished(tmp_path, capfd):
    plan = toy_plan(tmp_path)
    run_job(plan.jobs["one"], plan.jobs)

    def command(job):  # what it did is there, but not its answer
        return [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]

    Run(plan, [plan.jobs["one"]], {"one": "x"}, VERBS, command, 2, force=True).run()
    assert "again" not in capfd.readouterr().out


def test_a_scheduler_that_does_not_answer_is_one_error(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    from kdrecipe.jobs.dask import DaskTasks

    def refuse(*_, **__):
        raise OSError("Timed out")

    monkeypatch.setattr(distributed, "Client", refuse)
    with pytest.raises(KdrecipeError, match="no Dask scheduler answers at tcp://nowhere:1"):
        DaskTasks(DaskOptions(address="tcp://nowhere:1"), 2, tmp_path, print)


def test_without_slurm_the_remedy_is_named(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    from kdrecipe.jobs.slurm import SlurmJobs

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KdrecipeError, match=r"(?s)Slurm can't be used here.*login node"):
        SlurmJobs(SlurmOptions(), tmp_path, print)


# ---------------------------------------------------------------- options


def test_options_come_from_a_file_and_from_overrides(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("name: slurm\npartition: gpu\ngpus: 1\n")
    recipe, mine = split_overrides(["training.epochs=3", "executor.time_min=60"])
    assert recipe == ["training.epochs=3"]
    assert load_executor(str(file), mine) == SlurmOptions(partition="gpu", gpus=1, time_min=60)
    assert load_executor("dask", ["address=tcp://a:1"]) == DaskOptions(address="tcp://a:1")


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("slrum", [], "there is no executor 'slrum'.*slurm"),
        ("slurm", ["partion=gpu"], "partion: unknown key.*partition"),
        ("slurm", ["gpus=-1"], r"--set executor.gpus=-1.*greater than or equal to 0"),
        ("local", ["name=cloud"], "name: is 'cloud', it must be one of local, slurm, dask"),
    ],
)
def test_what_is_wrong_with_an_executor_is_told(text, overrides, said):
    with pytest.raises(RecipeError, match=f"(?s){said}") as error:
        load_executor(text, overrides)
    assert "--executor" in str(error.value) or "--set" in str(error.value)


# ---------------------------------------------------------------- kdrecipe status


def test_status_says_what_runs_where_how_far_and_until_when(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watch, "EVERY_S", 0.02)
    jobs = {
        "kd/seed1": {"state": "running", "where": "process 7"},
        "kd/seed2": {"state": "waiting", "where": ""},
    }
    jobs["kd/seed3"] = {"state": "running", "where": "Slurm 4_3 PENDING"}
    about = {"where": "a:1", "since": time.time(), "left": "1 of 4 jobs done", "ended": False, "jobs": jobs}
    (tmp_path / watch.RUN_FILE).write_text(json.dumps(about))
    out = tmp_path / "systems" / "kd" / "seed1"
    out.parent.mkdir(parents=True)
    with watch.watched("kd/seed1", out):
        watch.tell(10, 40, "step", False, "loss 2.1")
        time.sleep(0.05)
        watch.tell(20, 40, "step", False, "loss 2.0")
        time.sleep(0.1)
        assert main(["status", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert main(["status", str(tmp_path)]) == 0
        capsys.readouterr()
        old = time.time() - 100
        lost = watch.status_file(out).with_name(".seed9.status.json")
        lost.write_text(watch.status_file(out).read_text().replace("seed1", "seed9"))
        os.utime(lost, (old, old))
        main(["status", str(tmp_path)])
        later = capsys.readouterr().out
    assert "runs: 1 of 4 jobs done" in said
    assert f":{os.getpid()}, step 20 of 40, until about " in said
    assert "loss 2.0" in said
    assert "queued   kd/seed3" in said
    assert "Slurm 4_3 PENDING" in said
    assert "waiting  kd/seed2" in said
    assert "killed   kd/seed9" in later
    assert not watch.status_file(out).exists()  # a job that has ended says nothing


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "no run has left its state here" in capsys.readouterr().err
