"""Run stages of a recipe: say why each job runs, and hand them to the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdrecipe.errors import RecipeError
from kdrecipe.jobs.elsewhere import with_torchrun
from kdrecipe.jobs.executors import Executor, die_with_parent, num_gpus, set_threads
from kdrecipe.jobs.forecast import Forecast
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.run import Run
from kdrecipe.jobs.stamps import Job, locked, run_job, why_run
from kdrecipe.recipe.executor import DaskOptions, ExecutorOptions, SlurmOptions
from kdrecipe.recipe.imported import unset_variables
from kdrecipe.recipe.trials import OPTION
from kdrecipe.stages import STAGES, guard, trials
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.plan import build_plan, trials_plan
from kdrecipe.stages.report import closing, publish
from kdrecipe.stages.timing import outlook, seconds_before

if TYPE_CHECKING:
    from kdrecipe.recipe.load import Recipe
    from kdrecipe.stages.team import Team

TEACHER = 3  # the stage from which on it matters what teachers have learnt
MAX_JOBS = 8  # more processes than this need a large machine, and a deliberate choice (--jobs)


def run_recipe(
    recipe: Recipe,
    first: int = 0,
    last: int = len(STAGES) - 1,
    *,
    dry_run: bool = False,
    force: bool = False,
    jobs: int | None = None,
    work: Path | None = None,
    job: str | None = None,
    program: Sequence[str] = (),
    team: Team | None = None,
    executor: ExecutorOptions | None = None,
    tried: Recipe | None = None,
) -> None:
    """Run stages ``first`` to ``last``.

    Args:
        recipe: a checked recipe.
        first: number of the first stage.
        last: number of the last stage, included.
        dry_run: only say what would run, and why.
        force: run even what is up to date.
        jobs: processes side by side; None: one per GPU, or one per core up to 8.
        work: directory for everything made; None: see :func:`default_work`.
        job: run this one job and nothing else (what the processes side by side are started with).
        program: the command whose ``run`` this is, for those processes; () keeps to this process.
        team: the processes that train one model together; None: this one alone.
        executor: where jobs run; None: processes on this machine.
        tried: the recipe with a system for each of its trials, which are then what is run and compared.

    Raises:
        KdrecipeError: a stage failed or its inputs are missing; what was finished stays.
    """
    layout, plan = planned(recipe, tried, work)
    if job is not None:
        if team is None:  # torchrun stands in between
            die_with_parent()
        set_threads()
        if force or why_run(plan.jobs[job], plan.jobs) is not None:  # else it was given out twice
            run_job(plan.jobs[job], plan.jobs, team.work if team else None)
        return
    selected = [j for j in plan.jobs.values() if first <= j.stage <= last]
    reasons = plan.reasons(selected, force=force)
    if dry_run:
        _print_dry_run(selected, reasons)
        return
    if last >= TEACHER and (absent := unset_variables(recipe.plugins.registry, recipe.systems.values())):
        raise RecipeError(absent)
    if selected:
        plan.check_available([j for j in selected if j.name in reasons])
    with locked(layout.root / ".lock", "this recipe"):
        set_threads()
        verbs = [verb for verb, _ in STAGES]
        number = _num_jobs(jobs, executor) if reasons and program and team is None else 1

        def command(job: Job) -> list[str]:
            asked = [*program, *_job_arguments(recipe, layout, job, force)]
            asked += [OPTION] if tried is not None else []
            nproc = executor.nproc if isinstance(executor, SlurmOptions) and job.together else 1
            return with_torchrun(asked, nproc)

        forecast = Forecast([j for j in selected if j.name in reasons], seconds_before(recipe, plan), number)
        if forecast.jobs:
            print(outlook(forecast), flush=True)
        if last >= TEACHER and tried is None:
            for line in guard.warnings(recipe, layout, plan, reasons):
                print(line, flush=True)
        do = team.work if team else None
        make = _maker(executor, number, layout.root) if executor else None
        Run(plan, selected, reasons, verbs, command, number, force, forecast, do, make, layout.root).run()
    if last < len(STAGES) - 1:
        return
    if tried is not None:
        trials.publish(tried, plan.jobs[trials.JOB].out)
    else:
        publish(recipe, layout)
        print(f"\n{closing(recipe, layout)}", flush=True)


def planned(recipe: Recipe, tried: Recipe | None, work: Path | None) -> tuple[Layout, Plan]:
    """Where everything of a recipe is, and all its jobs, or those that compare its trials."""
    layout = Layout((work or default_work(recipe)).resolve())
    return layout, build_plan(recipe, layout) if tried is None else trials_plan(recipe, tried, layout)


def default_work(recipe: Recipe) -> Path:
    """``exp`` beside the recipe, or ``exp-<profile>``, so that a trial never costs a finished run."""
    return recipe.dir / (f"exp-{recipe.profile}" if recipe.profile else "exp")


def _print_dry_run(selected: Sequence[Job], reasons: dict[str, str]) -> None:
    for number, (verb, _) in enumerate(STAGES):
        stage = [j for j in selected if j.stage == number]
        if not stage:
            continue
        print(f"stage {number:2d} {verb}")
        for j in stage:
            print(
                f"    {j.name:34s} {'would run: ' + reasons[j.name] if j.name in reasons else 'up to date'}"
            )


def _job_arguments(recipe: Recipe, layout: Layout, job: Job, force: bool = False) -> list[str]:
    """The arguments with which kdrecipe runs one job of this recipe."""
    arguments = ["run", str(recipe.path), "--job", job.name, "--work", str(layout.root)]
    if recipe.profile:
        arguments += ["--profile", recipe.profile]
    for override in recipe.overrides:
        arguments += ["--set", override]
    if recipe.trust_plugins:
        arguments.append("--trust-plugins")
    if force:
        arguments.append("--force")
    return arguments


def _maker(
    executor: ExecutorOptions, number: int, root: Path
) -> Callable[[Callable[[str, str], None]], Executor] | None:
    """Makes the executor, once there is something to run."""
    if isinstance(executor, SlurmOptions):
        from kdrecipe.jobs.slurm import SlurmJobs

        return lambda relay: SlurmJobs(executor, root, relay)
    if isinstance(executor, DaskOptions):
        from kdrecipe.jobs.dask import DaskTasks

        return lambda relay: DaskTasks(executor, number, root, relay)
    return None


def _num_jobs(jobs: int | None, executor: ExecutorOptions | None) -> int:
    if isinstance(executor, SlurmOptions):
        return executor.at_most
    if jobs is not None:
        return max(1, jobs)
    return num_gpus() or min(os.cpu_count() or 1, MAX_JOBS)
