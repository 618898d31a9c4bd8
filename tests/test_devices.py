"""Which device is taken, what is said where there is none, and which allocator XLA has."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest
from fake_cuda import FakeDriver

from ellm_jax import EngineConfig
from ellm_jax.devices import CudaFound, DeviceError, choose_platform, find, open_devices
from ellm_jax.devices.allocator import ENVIRONMENT, check_allocator, prepare_environment
from ellm_jax.memory.device_pool import CudaUnavailable, DevicePool

ALL_THERE = CudaFound(
    kernels=True, plugin="jax-cuda13-plugin 0.11.2", driver="13.0", gpus=2, platforms=""
)


def test_auto_takes_the_gpu_only_where_all_is_there():
    assert ALL_THERE.missing is None
    assert choose_platform("auto", ALL_THERE) == "cuda"
    assert choose_platform("cuda", ALL_THERE) == "cuda"
    assert choose_platform("cpu", ALL_THERE) == "cpu"
    for name, value in (
        ("kernels", False),
        ("plugin", ""),
        ("driver", ""),
        ("gpus", 0),
        ("platforms", "cpu"),
    ):
        less = dataclasses.replace(ALL_THERE, **{name: value})
        assert choose_platform("auto", less) == "cpu", name


@pytest.mark.parametrize(
    ("changes", "there_is", "remedy"),
    [
        ({"kernels": False}, "no CUDA kernels", "ELLM_CUDA=ON"),
        (
            {"driver": "", "problem": "the NVIDIA driver cannot be loaded (x); install it"},
            "cannot be loaded",
            "install it",
        ),
        ({"gpus": 0}, "shows this process no GPU", "CUDA_VISIBLE_DEVICES"),
        ({"plugin": ""}, "there are 2 GPUs, but JAX has no CUDA plugin", "ellm-jax[cuda]"),
        ({"platforms": "cpu"}, "confined to 'cpu'", "unset JAX_PLATFORMS"),
    ],
)
def test_cuda_without_something_says_what_there_is_and_one_remedy(changes, there_is, remedy):
    with pytest.raises(DeviceError) as refusal:
        choose_platform("cuda", dataclasses.replace(ALL_THERE, **changes))
    said = str(refusal.value)
    assert said.startswith("device='cuda': ")
    assert there_is in said
    assert remedy in said.split("; ")[-1]


@pytest.mark.parametrize("platforms", ["cuda", "cuda,cpu", "gpu"])
def test_a_confined_jax_that_may_use_gpus_is_fine(platforms):
    assert dataclasses.replace(ALL_THERE, platforms=platforms).missing is None


def test_what_is_found_is_what_the_driver_and_the_packages_say(monkeypatch):
    monkeypatch.setattr(find, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(find, "load_driver", lambda: FakeDriver(devices=3))
    monkeypatch.setattr(find, "_plugin", lambda: "jax-cuda13-plugin 0.11.2")
    monkeypatch.setattr(find, "_platforms", lambda: "")
    assert find.find_cuda() == dataclasses.replace(ALL_THERE, gpus=3)

    def broken() -> None:
        raise CudaUnavailable("no libcuda; install the driver")

    monkeypatch.setattr(find, "load_driver", broken)
    found = find.find_cuda()
    assert (found.driver, found.gpus) == ("", 0)
    assert found.missing == ("no libcuda", "install the driver")


def test_this_machine_says_what_it_lacks():
    """Where nothing is missing this cannot be seen; tests/gpu looks at that."""
    found = find.find_cuda()
    if found.missing is None:
        pytest.skip("there is a GPU, and all that belongs to it")
    assert [device.platform for device in open_devices("auto")] == ["cpu"]
    with pytest.raises(DeviceError, match="device='cuda': "):
        open_devices("cuda")


def test_more_devices_than_there_are():
    have = len(jax.devices("cpu"))
    with pytest.raises(DeviceError, match=f"JAX makes {have} of the CPU.*device_count={have + 1}"):
        open_devices("cpu", have + 1)


def test_the_environment_is_set_for_jax_and_somebody_elses_choice_is_not_overruled():
    environ: dict[str, str] = {}
    prepare_environment(environ)
    assert environ == ENVIRONMENT
    prepare_environment(environ)
    prepare_environment({"XLA_PYTHON_CLIENT_PREALLOCATE": "0"})
    for name, value in (
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "bfc"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "platform"),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "true"),
        ("XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT", "1"),
    ):
        environ = {name: value}
        with pytest.raises(DeviceError, match=f"{name} is '{value}'.*unset it"):
            prepare_environment(environ)
        assert environ == {name: value}, "nothing is half done"


def test_jax_still_reads_the_environment_as_it_did():
    """What the allocator's choice rests on: see whether a new JAX still does it so."""
    code = (
        "from jaxlib import xla_client\n"
        "options = xla_client.generate_pjrt_gpu_plugin_options()\n"
        "print(options['allocator'], options['preallocate'], options['use_tfrt_gpu_client'])"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.split() == ["cuda_async", "False", "False"], ran.stderr


class Allocator:
    """Takes the place of `jax.device_put`, and allocates from a device's pool or from elsewhere.

    Attributes:
        waiting: run, and forgotten, when somebody waits for an array.
    """

    def __init__(self, monkeypatch, *, from_pool: bool = True):
        self.driver = FakeDriver()
        self.pool = DevicePool(0, self.driver)
        self.fake = self.driver.pools[0]
        self.fake.threshold = 1 << 40
        self.from_pool = from_pool
        self.waiting = []
        monkeypatch.setattr("jax.device_put", self.put)

    def put(self, array, device):
        if self.from_pool:
            self.fake.allocate(array.nbytes)
        return self

    def block_until_ready(self) -> None:
        if self.waiting:
            self.waiting.pop()()


def test_an_allocator_is_known_by_what_shows_in_the_pool(monkeypatch):
    check_allocator(Allocator(monkeypatch).pool, object())
    elsewhere = Allocator(monkeypatch, from_pool=False)
    device = object()
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"another allocator.*first engine.*=cuda_async"):
            check_allocator(elsewhere.pool, device)


def test_what_was_freed_before_or_is_freed_meanwhile_makes_no_allocator_another(monkeypatch):
    allocator = Allocator(monkeypatch)
    gib = 1 << 29
    allocator.fake.allocate(gib)
    allocator.fake.free(gib)
    # Waiting for the probe is when the host sees that.
    allocator.waiting.append(allocator.fake.synchronize)
    check_allocator(allocator.pool, object())
    # Another engine's step ends while the probe is taken, twice.
    for _ in range(2):
        allocator.fake.allocate(gib // 4)
        allocator.waiting.append(
            lambda: (allocator.fake.free(gib // 4), allocator.fake.synchronize())
        )
    check_allocator(allocator.pool, object())


def test_an_allocator_is_tried_out_once_for_a_device(monkeypatch):
    allocator, device = Allocator(monkeypatch), object()
    check_allocator(allocator.pool, device)
    taken = allocator.fake.live
    check_allocator(allocator.pool, device)
    assert allocator.fake.live == taken > 0


@pytest.mark.parametrize("name", ["device", "load_format"])
def test_choices_of_the_configuration_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}='tpu'.*leave it out for auto"):
        EngineConfig(**{name: "tpu"})
