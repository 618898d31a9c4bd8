"""Other engines beside ours: the same checkpoint and the same requests, each in an environment of
its own.

`catalogue` names the engines, `environments` installs them, `conversion` makes their own formats,
and `comparison` runs them in rounds. An engine runs in a process of its own: `child`, with the
engine's driver (`ellm`, `vllm_cpu`, ...). Drivers and converters know nothing of this package and
of one another, since they run where only the engine is installed.
"""
