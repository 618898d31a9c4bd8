"""How steps fail. No JAX, so that whoever drives steps can tell."""


class StepFailed(RuntimeError):
    """A step ended with an error of the runtime; its tokens are lost, the engine can go on."""


class CompileFailed(Exception):
    """XLA does not compile a step; requests that need it cannot run."""
