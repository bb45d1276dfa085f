"""Options of `moray up` (ports, cores, slots), chosen at the first start and kept in `up/options.json` for restarts.

Part of the composition root, because they include the options of the local cluster.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moray.cluster.local import LocalOptions, default_options
from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.core.ports import check_port, free_ports, is_free
from moray.platform.core.processes import marked

HOST = "127.0.0.1"
PORT = 8400
NAMES = ("ray-head", "ray-worker", "ray-watch", "mlflow", "controller")
# None of these uses Ray's default port: two clusters that start at the same time would both find it free.
_RAY_PORTS = ("ray_port", "dashboard_port", "client_port")


class UpOptions(BaseModel):
    """`up/options.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int = Field(ge=1, le=65535)
    cluster: LocalOptions

    @classmethod
    def read(cls, home: Home) -> UpOptions:
        """Reads the saved options. Raises InputError if `moray up` never ran, or if another version wrote them."""
        path = home.up / "options.json"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"no control plane was started for {home.root} yet", "start it: moray up") from None
        except ValidationError as error:
            raise InputError(
                f"{path} is invalid or from another version of Moray", f"moray down, delete {path}, moray up"
            ) from error


def url(options: UpOptions) -> str:
    return f"http://{HOST}:{options.port}"


def decide_options(
    home: Home, *, port: int | None = None, cpus: int | None = None, gpus: int | None = None, slots: int | None = None
) -> UpOptions:
    """Returns and saves the options for a start: the saved ones, overridden by the arguments.

    Raises InputError if a port is in use, or if this machine has fewer cores or GPUs than requested.
    """
    old = _earlier(home)
    ports = {name: getattr(old.cluster, name) if old else 0 for name in _RAY_PORTS}
    requested: dict[str, Any] = {"cpus": cpus, "gpus": gpus, "slots": slots}
    if old is not None:
        known = {name: getattr(old.cluster, name) for name in requested}
        requested = {name: known[name] if value is None else value for name, value in requested.items()}
        port = port or old.port
    chosen = port or PORT
    if running_services(home):
        return UpOptions.read(home)  # only the supervisor died; its services are adopted unchanged
    check_port(HOST, chosen)
    if not all(ports.values()) or not all(map(is_free, ports.values())):
        ports = dict(zip(_RAY_PORTS, free_ports(len(_RAY_PORTS)), strict=True))
    options = UpOptions(port=chosen, cluster=default_options(ports, **requested))
    write_json(home.up / "options.json", options.model_dump(mode="json"))
    return options


def _earlier(home: Home) -> UpOptions | None:
    """The saved options; None if there are none or they are unreadable."""
    try:
        return UpOptions.read(home)
    except InputError:
        return None


def running_services(home: Home) -> list[str]:
    """Names of the services with a living process, whether or not a supervisor runs."""
    return [name for name in NAMES if marked(home.root, name)]
