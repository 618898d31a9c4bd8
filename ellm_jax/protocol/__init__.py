"""The wire format: protocol definitions, and the code generated from them."""
