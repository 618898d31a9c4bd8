"""The committed code of the protocol is what the definition says."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc_tools", reason="generating needs grpcio-tools, of the extra `test`")

SCRIPT = Path(__file__).parent.parent / "scripts" / "generate_protocol"


def test_generated_code_is_fresh():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
