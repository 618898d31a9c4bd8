"""Measures the attention kernels against the bandwidth and the matrix rate of the machine."""

from __future__ import annotations

from gpu_check_lib.report import NO_GPU, Job, NotRun, main


def stage(job: Job) -> None:
    """Runs `ellm_jax.bench.cuda_kernels`."""
    if job.dry_run:
        raise NotRun(NO_GPU)
    from ellm_jax.devices import open_devices

    # Before anything else uses JAX: it has to leave the device's memory to the KV that is measured.
    open_devices("cuda")
    from ellm_jax.bench import cuda_kernels

    cuda_kernels.measure(job.report)


if __name__ == "__main__":
    main(stage)
