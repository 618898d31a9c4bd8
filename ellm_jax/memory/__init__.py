"""Who owns which bytes: plain Python over the native ledger; no JAX."""
