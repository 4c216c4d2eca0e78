"""The agents of a sweep at work: here, in new processes of this machine, or as tasks of a cluster, until no trial is left."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps import results
from finetune_dataflow.sweeps.agent import AgentJob, told
from finetune_dataflow.sweeps.claims import BEAT_SECONDS, SESSION
from finetune_dataflow.sweeps.clusters import Cluster
from finetune_dataflow.sweeps.storage import first_line, storage_errors
from finetune_dataflow.sweeps.study import Study

MOST_ROUNDS = 3  # without a trial that came to an end, where a cluster loses its agents


def run_here(job: AgentJob, jobs: int, study: Study) -> None:
    """Let agents work until no trial is left: one here, or so many in processes of their own."""
    if jobs == 1:
        _execute(job, 1, None)
    else:
        _run_processes(job, jobs)
    if job.storage and study.running():  # of agents elsewhere, or of one that was killed on another machine
        _execute(replace(job, patient=True), 1, None)


def run_there(found: Cluster, job: AgentJob, agents: int, study: Study) -> None:
    """Let so many agents work on a cluster until no trial is left. Raises UserError where the cluster cannot keep them."""
    with _Watch(study, job) as watch:
        rounds, ended = 0, -1
        while True:
            try:
                _execute(job, agents, found.executor(agents, watch.stop))
            except found.lost as error:
                print(f"An agent was lost on {found.named} ({first_line(error)}).", file=sys.stderr)
            else:
                if not study.running():
                    return
            now = len([each for each in study.results() if each.state != "running"])
            rounds, ended = (rounds + 1 if now == ended else 1), now
            if rounds > MOST_ROUNDS:
                raise UserError(
                    f"{found.named[0].upper()}{found.named[1:]} lost its agents {rounds} times in a row. The trials "
                    f"{', '.join(map(str, study.running())) or 'to come'} are not done; the same command goes on with them."
                )
            # Those that are claimed by whom the cluster lost are free again when their hearts have stood still for a while.
            job = replace(job, patient=True)


class _Watch(threading.Thread):
    """The heart of a sweep whose agents are elsewhere: they stop where it stands still. Prints the trials as they end."""

    def __init__(self, study: Study, job: AgentJob) -> None:
        super().__init__(daemon=True)
        self.study, self.key = study, f"{SESSION}:{job.session}"
        self.ended = threading.Event()
        self.stopped = False
        self.beat = 0
        self.told = {each.number for each in study.results() if each.state != "running"}

    def __enter__(self) -> _Watch:
        self._beat()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.join()
        self._tell()

    def stop(self) -> None:
        """Ask all agents to stop."""
        self.stopped = True
        print("Stopping the agents: each ends the update that it is at, and saves.", file=sys.stderr)
        self._beat()

    def run(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            try:
                self._beat()
                self._tell()
            except storage_errors() as error:
                print(f"The study cannot be reached ({type(error).__name__}).", file=sys.stderr)

    def _beat(self) -> None:
        self.beat += 1
        self.study.study.set_user_attr(self.key, {"beat": self.beat, "stopped": self.stopped})

    def _tell(self) -> None:
        found: list[results.TrialResult] = self.study.results()
        for each in found:
            if each.state != "running" and each.number not in self.told:
                self.told.add(each.number)
                print(told(each, self.study.sweep, self.study.best()), file=sys.stderr)


def _run_processes(job: AgentJob, jobs: int) -> None:
    from concurrent.futures.process import BrokenProcessPool

    from finetune_dataflow.sweeps.executors import NewProcesses

    cores = os.cpu_count() or 1
    shared = replace(job, threads=max(1, cores // jobs))
    while True:
        try:
            with _threads_of_children(shared.threads or 1):
                _execute(shared, jobs, NewProcesses(jobs))
            return
        except BrokenProcessPool:  # one was killed, perhaps for its memory: its trial is begun again, or told as failed
            print("A process of a trial ended without a word. The others go on.", file=sys.stderr)


def _execute(job: AgentJob, agents: int, executor: Any) -> None:
    from hamilton import driver
    from hamilton.execution import executors

    from finetune_dataflow.sweeps import flow

    dr = (
        driver.Builder()
        .with_modules(flow)
        .enable_dynamic_execution(allow_experimental_mode=True)
        .with_local_executor(executors.SynchronousLocalTaskExecutor())
        .with_remote_executor(executor or executors.SynchronousLocalTaskExecutor())
        .build()
    )
    dr.execute(["ended_trials"], inputs={"agent_jobs": [job] * agents})


@contextmanager
def _threads_of_children(count: int) -> Iterator[None]:
    """Processes that are started within the block give their BLAS so many threads, where the user does not say how many."""
    name = "OPENBLAS_NUM_THREADS"
    if os.environ.get(name):
        yield
        return
    os.environ[name] = str(count)
    try:
        yield
    finally:
        del os.environ[name]
