"""Clients of OpenAI's API against a served model: openai, litellm, langchain-openai; random requests by schemathesis.

The model has random weights and the plain chat template. `make bench-clients` installs the clients in an environment of
their own and runs this.

Usage: python benchmarks/api_conformance.py [examples=20]
examples: of schemathesis for each route and phase; 20 make some 2,300 requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness.result import Bar, report
from serving_http import make_model

HERE = Path(__file__).parent
PYTHON = HERE / "peers" / ".venv-clients" / "bin" / "python"
MEASURES = ("moray.pipelines.serve.application", "moray.pipelines.serve.gateway", "moray.pipelines.serve.openai_api")
LEAST = {"openai": 80, "schemathesis": 2000}  # cases


def answers(url: str, examples: int) -> dict[str, Any]:
    command = [str(PYTHON), str(HERE / "peers" / "api_clients.py"), url, "model", str(examples)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": ""})
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def main(examples: int) -> int:
    from moray.cluster.embedded import EmbeddedCluster
    from moray.pipelines.serve.session import open_session
    from moray.pipelines.shared.chat_files import PLAIN_CHAT
    from moray.platform.core.home import Home

    if not PYTHON.exists():
        print("error: the clients are not installed\nhint: make bench-clients", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MORAY_HOME"] = str(Path(folder) / "home")
        model = Path(folder) / "model"
        make_model(model)
        (model / "chat_template.jinja").write_text(PLAIN_CHAT.read_text("utf-8"))
        cluster = EmbeddedCluster(Home.from_environment())
        cluster.ensure()
        try:
            session = open_session(model, "model")
            found = answers(session.url, examples)
            session.stop()
        finally:
            cluster.stop()
    rows = [
        {"client": name, "cases": one["cases"], "wrong": len(one["wrong"]), "first": one["wrong"][:9]}
        for name, one in found.items()
    ]
    bars = [Bar(f"wrong cases of {row['client']}", row["wrong"], 0, "lower") for row in rows]
    bars += [Bar(f"cases of {name}", found[name]["cases"], least, "higher") for name, least in LEAST.items()]
    return report("api_conformance", rows, bars, MEASURES)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
