"""The core served over gRPC, as `ellm_jax/protocol/v1/ellm.proto` says."""
