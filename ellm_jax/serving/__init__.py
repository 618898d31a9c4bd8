"""Serves one engine to many clients: the core that every transport shares, and the transports."""
