"""Jobs, stamps and the plan: what runs, why, and what a failure leaves behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdrecipe.artifacts import read_json, write_json
from kdrecipe.errors import KdrecipeError
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job, describe_change, locked, run_job, why_run
from kdrecipe.stages import STAGES
from kdrecipe.stages.layout import Layout


class Work:
    """Three jobs in a row, a -> b -> c, that write what they are told."""

    def __init__(self, root: Path, **options: bool) -> None:
        self.root = root
        self.options = options
        self.texts = {"a": "one", "b": "two", "c": "three"}
        self.inputs: dict[str, dict] = {
            "a": {"training": {"lr": 0.002, "epochs": 3}},
            "b": {},
            "c": {},
        }
        self.ran: list[str] = []
        self.plan = self.make()

    def make(self) -> Plan:
        plan = Plan()
        for stage, name in enumerate("abc"):
            needs = (chr(ord(name) - 1),) if name != "a" else ()
            plan.add(
                Job(stage, name, self.root / name, self.inputs[name], self._run(name), needs, **self.options)
            )
        self.plan = plan
        return plan

    def _run(self, name: str):
        def run(out: Path) -> None:
            self.ran.append(name)
            (out / "sub").mkdir(exist_ok=True)
            (out / "sub" / "text").write_text(self.texts[name])

        return run

    def reasons(self, names: str = "abc", *, force: bool = False) -> dict[str, str]:
        return self.plan.reasons([self.plan.jobs[n] for n in names], force=force)

    def run(self, names: str = "abc") -> None:
        for name in names:
            run_job(self.plan.jobs[name], self.plan.jobs)


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path / "exp")


@pytest.fixture
def finished(work):
    work.run()
    return work


# ---------------------------------------------------------------- reasons


def test_at_first_all_run(work):
    assert work.reasons() == dict.fromkeys("abc", "no finished output")


def test_what_is_finished_does_not(finished):
    assert finished.reasons() == {}
    assert finished.ran == ["a", "b", "c"]


def test_a_changed_input_is_named_by_its_path(finished):
    finished.inputs["a"] = {"training": {"lr": 0.001, "epochs": 3}}
    finished.make()
    assert finished.reasons() == {
        "a": "changed: training.lr 0.002 -> 0.001",
        "b": "a will run",
        "c": "b will run",
    }


def test_inputs_equal_as_json_are_equal(finished):
    finished.inputs["a"] = {"training": {"epochs": 3, "lr": 2e-3}}
    finished.inputs["b"] = {}
    finished.make()
    assert finished.reasons() == {}


def test_upstream_that_has_run_since(finished):
    finished.texts["a"] = "other"
    finished.run("a")
    assert finished.reasons() == {"b": "a has changed since", "c": "b will run"}


def test_upstream_that_ran_again_with_the_same_result_changes_nothing(finished):
    finished.run("a")
    assert finished.reasons() == {}


def test_only_what_is_selected_runs(finished):
    finished.texts["a"] = "other"
    finished.run("a")
    assert finished.reasons("c") == {}


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("o")], ids=["gone", "cut"])
def test_a_missing_or_damaged_file(finished, damage):
    damage(finished.root / "a" / "sub" / "text")
    assert finished.reasons("a") == {"a": "sub/text is missing or damaged"}


def test_force(finished):
    assert finished.reasons("ab", force=True) == {"a": "forced", "b": "forced"}


@pytest.mark.parametrize("content", [b"", b'{"inputs": {', b"\xff\xfe\x00", b"[]", b"{}", b"null"])
def test_a_damaged_stamp_is_noticed_and_mended(finished, content):
    finished.plan.jobs["a"].stamp.write_bytes(content)
    assert finished.reasons() == {"a": "its stamp is damaged", "b": "a will run", "c": "b will run"}
    finished.run("a")
    assert finished.reasons() == {}


def test_changes_beyond_three_are_counted():
    old, new = {"a": [1, 2], "b": 1, "c": 1, "d": 1}, {"a": [1, 3], "b": 2, "c": "x" * 60, "e": 1}
    text = describe_change(old, new)
    assert text.startswith("a[1] 2 -> 3, b 1 -> 2, c 1 -> xxx")
    assert text.endswith("... (and 2 more)")
    assert describe_change({"a": 1}, {}) == "a 1 -> absent"
    assert describe_change({"a": [1]}, {"a": [1, 2]}) == "a [1] -> [1, 2]"


# ---------------------------------------------------------------- the plan


def test_a_name_taken_twice_and_an_unknown_need_are_bugs(work):
    with pytest.raises(AssertionError):
        work.plan.add(work.plan.jobs["a"])
    with pytest.raises(AssertionError):
        work.plan.add(Job(3, "d", work.root / "d", {}, lambda out: None, needs=("nothing",)))


def test_stages_whose_inputs_are_missing_are_refused(work):
    jobs = work.plan.jobs
    with pytest.raises(KdrecipeError, match="stage 2 reads what earlier stages have not finished") as error:
        work.plan.check_available([jobs["c"]])
    assert "a (no finished output); b (no finished output)" in str(error.value)  # b needs a
    assert error.value.problems[0].remedy == "start with --stage 0"
    work.plan.check_available([jobs["a"], jobs["b"], jobs["c"]])


def test_stages_whose_inputs_are_stale_are_refused(finished):
    finished.inputs["b"] = {"temperature": 2}
    finished.make()
    with pytest.raises(KdrecipeError, match=r"b \(changed: temperature absent -> 2\)"):
        finished.plan.check_available([finished.plan.jobs["c"]])


def test_the_stage_table_is_complete():
    assert len(STAGES) == 11
    assert [verb for verb, _ in STAGES][:3] == ["prepare", "features", "tokens"]
    layout = Layout(Path("exp"))
    places = [layout.manifests, layout.features, layout.tokens, layout.scores, layout.report]
    places += [f("kd", 1) for f in (layout.system, layout.targets, layout.export, layout.hyps)]
    assert len(set(places)) == 9


# ---------------------------------------------------------------- running a job


def test_the_stamp_tells_what_was_made_and_from_what(finished):
    stamp = read_json(finished.plan.jobs["b"].stamp)
    assert stamp["files"] == {"sub/text": 3}
    assert stamp["needs"] == {"a": read_json(finished.plan.jobs["a"].stamp)["content"]}
    assert list(finished.root.glob("*.partial")) == []
    assert list(finished.root.glob("*.old")) == []


def failing(out: Path) -> None:
    (out / "half").write_text("half")
    raise RuntimeError("broken on purpose")


def replaced(job: Job, **changes) -> Job:
    return Job(**{**vars(job), **changes})


def test_a_failure_leaves_the_old_output_alone(finished):
    job = replaced(finished.plan.jobs["a"], run=failing, inputs={"new": 1})
    with pytest.raises(RuntimeError, match="on purpose"):
        run_job(job, finished.plan.jobs)
    assert (job.out / "sub" / "text").read_text() == "one"
    assert finished.reasons() == {}  # for the recipe as it was
    assert why_run(job, finished.plan.jobs).startswith("changed: ")


def test_a_first_failure_leaves_no_output(work):
    job = replaced(work.plan.jobs["a"], run=failing)
    with pytest.raises(RuntimeError):
        run_job(job, work.plan.jobs)
    assert not job.out.exists()
    assert why_run(job, work.plan.jobs) == "no finished output"


def test_a_failure_in_place_leaves_no_stamp(tmp_path):
    work = Work(tmp_path / "exp", in_place=True)
    work.run()
    job = replaced(work.plan.jobs["a"], run=failing)
    with pytest.raises(RuntimeError):
        run_job(job, work.plan.jobs)
    assert not job.stamp.exists()
    assert work.reasons()["a"] == "no finished output"
    work.run("a")
    assert not (job.out / "half").exists()
    assert work.reasons() == {}


def test_a_full_disk_is_told_with_a_remedy(work):
    def full(out: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "x"))

    with pytest.raises(KdrecipeError, match="no space left") as error:
        run_job(replaced(work.plan.jobs["a"], run=full), work.plan.jobs)
    assert "--work" in error.value.problems[0].remedy


# ---------------------------------------------------------------- resuming


class Interrupted(BaseException):
    """As good as a kill: nothing is tidied up for it."""


def interrupt(job: Job, jobs: dict[str, Job]) -> None:
    def run(out: Path) -> None:
        (out / "checkpoint").write_text("halfway")
        (out / ".weights.pt.77.part").write_text("half writ")
        raise Interrupted

    with pytest.raises(Interrupted):
        run_job(replaced(job, run=run), jobs)


def found_on_start(job: Job, jobs: dict[str, Job]) -> list[str]:
    """Runs the job, gives the files that it found in its directory."""
    found: list[str] = []

    def run(out: Path) -> None:
        found.extend(sorted(p.name for p in out.iterdir() if p.name != "started.json"))
        (out / "done").write_text("done")

    run_job(replaced(job, run=run), jobs)
    return found


@pytest.fixture
def resumable(tmp_path):
    work = Work(tmp_path / "exp", resumable=True)
    work.run("a")
    return work


def test_an_interrupted_job_goes_on(resumable):
    job = resumable.plan.jobs["b"]
    interrupt(job, resumable.plan.jobs)
    assert resumable.reasons("b") == {"b": "interrupted before, resumes"}
    assert found_on_start(job, resumable.plan.jobs) == ["checkpoint"]
    assert "started.json" not in read_json(job.stamp)["files"]
    assert resumable.reasons("ab") == {}


def test_other_inputs_start_anew(resumable):
    interrupt(resumable.plan.jobs["b"], resumable.plan.jobs)
    resumable.inputs["b"] = {"lr": 1}
    resumable.make()
    assert resumable.reasons("b") == {"b": "no finished output"}
    assert found_on_start(resumable.plan.jobs["b"], resumable.plan.jobs) == []


def test_other_content_upstream_starts_anew(resumable):
    interrupt(resumable.plan.jobs["b"], resumable.plan.jobs)
    resumable.texts["a"] = "another teacher"
    resumable.run("a")
    assert resumable.reasons("b") == {"b": "no finished output"}
    assert found_on_start(resumable.plan.jobs["b"], resumable.plan.jobs) == []


def test_a_damaged_note_of_the_start_starts_anew(resumable):
    job = resumable.plan.jobs["b"]
    interrupt(job, resumable.plan.jobs)
    (resumable.root / "b.partial" / "started.json").write_text("{")
    assert found_on_start(job, resumable.plan.jobs) == []


def test_jobs_that_can_not_go_on_start_anew(finished):
    interrupt(finished.plan.jobs["b"], finished.plan.jobs)
    assert found_on_start(finished.plan.jobs["b"], finished.plan.jobs) == []


def test_a_kill_between_the_two_renames_is_survived(finished):
    job = finished.plan.jobs["b"]
    os.replace(job.out, job.out.with_name("b.old"))  # the new one was about to take its place
    assert finished.reasons("b") == {"b": "no finished output"}
    finished.run("b")
    assert finished.reasons() == {}
    assert not job.out.with_name("b.old").exists()


# ---------------------------------------------------------------- locks

HOLD = """
import sys, time
from pathlib import Path
from kdrecipe.jobs.stamps import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold():
    """Starts a process that holds a lock."""
    started = []

    def start(path: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_job_that_another_process_does_is_refused(work, hold):
    holder = hold(work.root / ".a.lock")
    with pytest.raises(KdrecipeError, match="another process is working on job a") as error:
        work.run("a")
    assert "--work" in str(error.value)
    assert work.ran == []
    holder.send_signal(signal.SIGKILL)  # who is killed holds no lock
    holder.wait()
    for _ in range(50):
        try:
            work.run("a")
            break
        except KdrecipeError:
            time.sleep(0.1)
    assert work.ran == ["a"]


def test_a_lock_is_free_again_afterwards(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "deep" / ".lock", "it"):
            pass
    with pytest.raises(RuntimeError), locked(tmp_path / ".lock", "it"):
        raise RuntimeError
    with locked(tmp_path / ".lock", "it"):
        pass


def test_a_file_where_the_work_directory_should_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KdrecipeError, match="--work"), locked(tmp_path / "file" / "exp" / ".lock", "it"):
        pass
    with pytest.raises(KdrecipeError, match="--work"), locked(tmp_path / "file" / ".lock", "it"):
        pass


def test_needs_must_be_there_when_a_job_runs(work):
    with pytest.raises(KdrecipeError, match="missing file"):
        work.run("b")
    write_json(work.root / "a" / "stamp.json", {"content": "x"})
    work.run("b")
