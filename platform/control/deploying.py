"""Makes deployments: finds the model, checks that its replicas can be placed, and records that it is to be served."""

from __future__ import annotations

from moray.platform.control.deployment_rounds import DeploymentRounds
from moray.platform.control.deployments import Deployment, Deployments, NewDeployment
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.room import check_fit
from moray.platform.control.served_models import ServedModels
from moray.platform.core.api_keys import check_guarded
from moray.platform.core.cluster import BackendUnreachableError, Usage
from moray.platform.core.errors import UnavailableError
from moray.platform.core.home import Home
from moray.platform.core.ports import check_port
from moray.platform.core.serve_options import ServeOptions


def make_deployment(
    home: Home, deployments: Deployments, serving: DeploymentRounds, new: NewDeployment
) -> tuple[Deployment, bool]:
    """Records that a cluster is to serve a model. Returns the deployment, and whether it is new.

    Raises InputError for a model, a port or options that cannot be, ConflictError as `Deployments.deploy`, and
    UnavailableError if the cluster does not respond and the options do not say whether a replica gets a GPU.
    """
    cluster = serving.cluster
    if cluster.serving is not None:
        check_guarded(home, cluster.serving.host)
    found = ServedModels(home, cluster).find(new.model)
    gpus = _check_resources(cluster, new.options)
    current = serving.seen.port if serving.seen else 0
    if new.port and new.port != current and cluster.serving and not cluster.store:
        check_port(cluster.serving.host, new.port)  # Serve of this machine would move to it
    known = {one.name for one in deployments.all()}
    named = new.model_copy(update={"model": found.model})
    deployed = deployments.deploy(named, found.reference, found.folder, gpus, serving.reports.base)
    return deployed, deployed.name not in known


def _check_resources(cluster: ManagedCluster, options: ServeOptions) -> int:
    """The GPUs of the cluster, of which replicas get one each by default. Raises InputError if the replicas can never
    be placed."""
    try:
        usage = _usage(cluster)
    except BackendUnreachableError as error:  # a deployment of known resources waits for the cluster
        if options.gpus == -1 and options.device == "auto":
            raise UnavailableError(
                f"cluster {cluster.name!r} does not respond, so it is not known whether it has GPUs: {error}",
                "try again later, or say --gpus 0 or --gpus 1",
            ) from error
        return int(options.gpus != 0 and options.device != "cpu")
    check_fit(options.resources(int(usage.gpus)), options.replicas, usage)
    return int(usage.gpus)


def _usage(cluster: ManagedCluster) -> Usage:
    """The resources of a cluster. Raises BackendUnreachableError."""
    if cluster.store:
        return cluster.backend.usage()
    has = cluster.topology()  # the workers of this machine may still be starting
    return Usage(has.cpus, 0.0, has.gpus, 0.0, 1, memory_bytes=has.memory_bytes)
