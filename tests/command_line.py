"""Moray's commands, run in this process: starting an interpreter takes longer than most of them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from pathlib import Path
from unittest import mock

from moray.platform.cli.main import main


def run_command(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `moray *arguments` prints, and its exit code, with `home` as MORAY_HOME and lines of 200 characters."""
    out, err = io.StringIO(), io.StringIO()
    settings = {"MORAY_HOME": str(home), "COLUMNS": "200"}
    with mock.patch.dict(os.environ, settings), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(["moray", *arguments], code, out.getvalue(), err.getvalue())
