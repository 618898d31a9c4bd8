"""Version 1 of the gRPC interface: `ellm.proto`, and the code that is generated from it."""
