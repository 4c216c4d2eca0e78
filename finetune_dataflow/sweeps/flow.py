"""The dataflow of a sweep: agents that take trial after trial from the study, wherever Hamilton's executors put them."""

from __future__ import annotations

from hamilton.htypes import Collect, Parallelizable

from finetune_dataflow.sweeps.agent import AgentJob, work
from finetune_dataflow.sweeps.agent_process import in_own_process


def agent_job(agent_jobs: list[AgentJob]) -> Parallelizable[AgentJob]:
    """What each agent is told."""
    yield from agent_jobs


def agent_trials(agent_job: AgentJob) -> list[int]:
    """The numbers of the trials that one agent brought to an end."""
    return in_own_process(agent_job) if agent_job.away else work(agent_job)


def ended_trials(agent_trials: Collect[list[int]]) -> list[int]:
    """The numbers of the trials that all agents brought to an end."""
    return sorted(number for numbers in agent_trials for number in numbers)
