"""How steps fail. No JAX, so that whoever drives steps can tell."""

from ellm_jax.runtime.shapes import StepMode


class StepFailed(RuntimeError):
    """A step ended with an error of the runtime; its tokens are lost, the engine can go on."""


class CompileFailed(Exception):
    """XLA does not compile a step; requests that need it cannot run.

    Attributes:
        mode: what the step was to do besides the usual.
    """

    def __init__(self, message: str, mode: StepMode):
        super().__init__(message)
        self.mode = mode
