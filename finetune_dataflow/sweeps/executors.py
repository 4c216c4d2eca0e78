"""Hamilton's executors for the agents of a sweep: new processes of this machine, Ray's tasks, Dask's tasks."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from hamilton.execution import executors
from hamilton.execution.grouping import TaskImplementation
from hamilton.execution.state import TaskState

LOOKING_SECONDS = 0.1  # Hamilton asks without a pause
STOP_SECONDS = 60.0  # for tasks to end after the batch they are at


class PatientFuture(executors.TaskFutureWrappingPythonFuture):
    """A future that lets some time pass while it is not done: otherwise the asking takes a core."""

    def get_state(self) -> TaskState:
        """The state of the task."""
        if not self.future.done():
            time.sleep(LOOKING_SECONDS)
        return super().get_state()


class NewProcesses(executors.PoolExecutor):
    """New processes of this machine: a fork would share locks and threads that BLAS and MLX hold."""

    def create_pool(self) -> ProcessPoolExecutor:
        """The pool."""
        return ProcessPoolExecutor(self.max_tasks, mp_context=multiprocessing.get_context("spawn"))

    def submit_task(self, task: TaskImplementation) -> PatientFuture:
        """Give a task to a process."""
        return PatientFuture(super().submit_task(task).future)


def ray_agents(cpus: int, gpus: int, stop: Callable[[], None]) -> executors.TaskExecutor:
    """Hamilton's executor on a Ray that is initialised, for agents of so many cores and GPUs each, spread over the machines.

    stop: asks agents that still work when the graph is left to stop.
    """
    import ray
    from hamilton.plugins.h_ray import RayTaskExecutor

    class RayFuture(PatientFuture):
        def get_result(self) -> Any:
            try:
                return super().get_result()
            except ray.exceptions.RayTaskError as error:  # its message is a whole traceback
                raise error.cause from None

    class RayAgents(RayTaskExecutor):
        def __init__(self) -> None:
            super().__init__(skip_init=True)
            self.references: list[Any] = []

        def submit_task(self, task: TaskImplementation) -> RayFuture:
            options: dict[str, Any] = {"num_cpus": cpus, "scheduling_strategy": "SPREAD"}
            if gpus:
                options["num_gpus"] = gpus
            self.references.append(ray.remote(executors.base_execute_task).options(**options).remote(task=task))
            return RayFuture(self.references[-1].future())

        def finalize(self) -> None:
            left = ray.wait(self.references, num_returns=len(self.references), timeout=0)[1] if self.references else []
            if left:
                stop()
                for each in left:
                    ray.cancel(each)
                for each in ray.wait(left, num_returns=len(left), timeout=STOP_SECONDS)[1]:
                    ray.cancel(each, force=True)
            super().finalize()

    return RayAgents()


def dask_agents(client: Any, workers: Sequence[str], stop: Callable[[], None]) -> executors.TaskExecutor:
    """Hamilton's executor on a client of Dask, for one agent a worker as far as there are workers; `stop` as with Ray."""
    from hamilton.plugins.h_dask import DaskExecutor

    class DaskAgents(DaskExecutor):
        def __init__(self) -> None:
            super().__init__(client=client)
            self.futures: list[Any] = []

        def submit_task(self, task: TaskImplementation) -> PatientFuture:
            here = [workers[len(self.futures) % len(workers)]]
            # Not pure: to Dask, two agents with the same job would be one.
            future = client.submit(
                executors.base_execute_task, task, pure=False, workers=here, allow_other_workers=True, retries=0
            )
            self.futures.append(future)
            return PatientFuture(future)

        def finalize(self) -> None:
            left = [each for each in self.futures if not each.done()]
            if left and client.status == "running":
                stop()
                end = time.monotonic() + STOP_SECONDS
                while not all(each.done() for each in left) and time.monotonic() < end:
                    time.sleep(LOOKING_SECONDS)
                client.cancel(left, force=True)
            super().finalize()

    return DaskAgents()
