"""Starts Ray Serve, with Moray's gateway in its proxies, on the cluster of this job: `python -m
moray.pipelines.serve.start HOST PORT`.

Serve outlives the job. Its proxies inherit the job's runtime environment, and with it Moray's code.
"""

from __future__ import annotations

import logging
import sys

from moray.pipelines.serve.application import import_serve


def main(host: str, port: int) -> None:
    import ray
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    serve = import_serve()
    serve.start(
        http_options=HTTPOptions(host=host, port=port),
        proxy_location="EveryNode",
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
