"""Training under Ray Train, which places the workers, starts each with the same `TrainingJob`, and restarts them."""

from __future__ import annotations

import contextlib
from typing import Any

from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.devices import cpu_share
from moray.pipelines.pretrain.lr_schedule import batch_plan
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import StepFailed

_ABORT_SECONDS = 10.0
# Ray Train 2.60 starts two actors per run that are not needed here: one for Ray Data's data sets, and one that frees
# the placement group of a dead controller, which the end of our driver also does. An actor is a process. On few cores
# it takes seconds to start and, when idle, a hundredth of a core.
UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")


def fit(job: TrainingJob, tokens: str, storage: str, topology: Topology) -> None:
    """Runs the workers under Ray Train until the last step. Raises StepFailed with the failed worker's error."""
    import ray.train

    from moray.actors.data.data_worker import start_data_workers
    from moray.actors.rank_watch import start_watch

    config = job.config
    plan = batch_plan(config, job.sequence_length)
    helpers = start_data_workers(config.data_workers, tokens, config.mixture, config.seed, plan)
    settings = {"job": job, "loaders": list(helpers)}
    settings["watch"] = start_watch(config.resilience.hang_seconds, job.events, job.step)
    helpers.append(settings["watch"])
    trainer = make_trainer(job, settings, storage, topology)
    try:
        trainer.fit()
    except KeyboardInterrupt:
        trainer.abort()
        raise
    except SystemExit as stop:  # raised by Ray Train's own SIGINT handler, if a version of it sets that anyway
        raise KeyboardInterrupt from stop
    except ray.train.TrainingFailedError as error:
        raise StepFailed(f"training failed: {_reason(error)}") from error
    finally:
        for helper in helpers:
            ray.kill(helper)


def make_trainer(job: TrainingJob, settings: dict[str, Any], storage: str, topology: Topology) -> Any:
    """A TorchTrainer that runs `loop.train_steps` with these settings. `job.config` is resolved for its devices."""
    import ray
    import ray.train.torch

    from moray.pipelines.pretrain.loop import train_steps
    from moray.pipelines.pretrain.resilience.spares import SpareHosts

    base: Any = ray.train.torch.TorchTrainer

    class Trainer(base):
        # Not public. If another version of Ray does not call this, the unused actors run as well.
        def _create_default_callbacks(self) -> list[Any]:
            default = [one for one in super()._create_default_callbacks() if type(one).__name__ not in UNUSED]
            return [*default, SpareHosts(settings["watch"])] if "watch" in settings else default

        # Not public either. Ray Train would install its own SIGINT handler and never remove it. That handler swallows
        # the signal that ends a step that can never start, and Ctrl-C in later steps.
        def _register_sigint_handler(self, controller: Any) -> None:
            self._controller = controller

        def abort(self) -> None:
            """Stops the workers and kills the controller. Does nothing if it was not started."""
            if (controller := getattr(self, "_controller", None)) is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(controller.abort.remote(), timeout=_ABORT_SECONDS)
                ray.kill(controller)  # it does not answer calls while it waits for cluster capacity

    config, gpu = job.config, job.config.parallel.device == "gpu"
    workers, least = config.parallel.workers, config.resilience.min_workers
    cpus = cpu_share(workers, topology.cpus)
    scaling: Any = ray.train.ScalingConfig
    return Trainer(
        train_steps,
        train_loop_config=settings,
        torch_config=ray.train.torch.TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=scaling(
            num_workers=(least, workers) if least else workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if gpu else {})},
            elastic_resize_monitor_interval_s=config.resilience.resize_seconds,
        ),
        run_config=ray.train.RunConfig(
            name=job.step,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=config.resilience.max_failures),
        ),
    )


def _reason(error: Exception) -> str:
    """The last line that is not blank in Ray's chain of causes."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else error.__cause__ or error
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(inner).__name__
