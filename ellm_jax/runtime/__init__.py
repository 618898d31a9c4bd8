"""Steps: what is compiled, what goes in, what comes out."""
