"""Long prompts and the largest batch under the policy static-chunked."""

from __future__ import annotations

from gpu_check_lib.policies import measure_policy
from gpu_check_lib.report import Job, main


def stage(job: Job) -> None:
    """See `measure_policy`."""
    measure_policy(job, "static-chunked")


if __name__ == "__main__":
    main(stage)
