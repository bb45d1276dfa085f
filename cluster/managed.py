"""The clusters that a controller can run jobs on: the one beside it, and those of profiles."""

from __future__ import annotations

from functools import partial

from moray.cluster.existing import ExistingJobs
from moray.cluster.local import LocalCluster, LocalOptions
from moray.cluster.ray_jobs import LocalJobs
from moray.cluster.serve_api import ExistingServe, ServeApi
from moray.platform.control.choices import LOCAL
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.profiles import Profile, load_profile
from moray.platform.core.cluster import Topology
from moray.platform.core.home import Home
from moray.platform.store.paths import set_store_variables


def local_cluster(home: Home, options: LocalOptions) -> ManagedCluster:
    """The cluster of `moray up`. Its drivers see this machine's files."""
    cluster = LocalCluster(home, options)
    topology = Topology(options.cpus, options.gpus, options.memory_bytes)
    jobs = LocalJobs(cluster)
    return ManagedCluster(
        LOCAL,
        jobs,
        options.slots,
        lambda: topology,
        address=cluster.address,
        environment={"MORAY_HOME": str(home.root)},
        where="this machine",
        serving=ServeApi(jobs, "127.0.0.1"),
    )


def find_cluster(home: Home, name: str) -> ManagedCluster:
    """The cluster of a profile. Raises InputError if there is none, or if its profile is wrong."""
    return open_cluster(load_profile(home, name), name)


def open_cluster(profile: Profile, name: str = "existing") -> ManagedCluster:
    """The cluster that a profile describes. Connects to nothing yet."""
    set_store_variables(profile.store, profile.variables())
    jobs = ExistingJobs(profile)
    return ManagedCluster(
        name,
        jobs,
        profile.slots,
        partial(_topology, jobs),
        store=profile.store,
        version=profile.digest(),
        where=profile.address,
        serving=ExistingServe(jobs),
    )


def _topology(jobs: ExistingJobs) -> Topology:
    usage = jobs.usage()
    return Topology(max(1, int(usage.cpus)), int(usage.gpus), int(usage.memory_bytes))
