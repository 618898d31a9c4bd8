"""`python -m ellm_jax`: the same as `ellm`."""

import sys

from ellm_jax.cli import main

sys.exit(main())
