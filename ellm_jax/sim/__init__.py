"""The engine without a device: the real host loop, scheduler, ledger and chunk pool, driven by a
fake clock. For finding mistakes by the thousand, and for sizing machines. No JAX."""
