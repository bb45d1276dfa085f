"""Ray Train's part of a run: it places the workers, starts them with the same `TrainingJob`, and starts them again."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from moray.pipelines.pretrain.config import TrainingJob
from moray.pipelines.pretrain.devices import cpu_share
from moray.pipelines.pretrain.lr_schedule import batch_plan
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import StepFailed

_ABORT_SECONDS = 10.0
# What Ray Train 2.60 starts for every run, and ours have no use for: an actor for Ray Data's data sets, and one that
# frees the placement group of a dead controller, as the end of our driver does anyway. An actor is a process: on few
# cores it takes seconds to start and, idle, a hundredth of one.
UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")


def fit(job: TrainingJob, tokens: str, storage: Path, topology: Topology) -> None:
    """Runs the workers under Ray Train until the last step. Raises StepFailed with the reason a worker gave."""
    import ray.train

    from moray.actors.data.data_worker import start_data_workers
    from moray.actors.rank_watch import start_watch

    config = job.config
    plan = batch_plan(config, job.sequence_length)
    helpers = start_data_workers(config.data_workers, tokens, config.mixture, config.seed, plan)
    settings = {"job": job, "loaders": list(helpers)}
    settings["watch"] = start_watch(config.hang_seconds, job.events, job.step)
    helpers.append(settings["watch"])
    trainer = make_trainer(job, settings, storage, topology)
    try:
        trainer.fit()
    except KeyboardInterrupt:
        trainer.abort()
        raise
    except SystemExit as stop:  # how Ray Train's own handler ends, where a version of it sets that all the same
        raise KeyboardInterrupt from stop
    except ray.train.TrainingFailedError as error:
        raise StepFailed(f"training failed: {_reason(error)}") from error
    finally:
        for helper in helpers:
            ray.kill(helper)


def make_trainer(job: TrainingJob, settings: dict[str, Any], storage: Path, topology: Topology) -> Any:
    """A TorchTrainer for `loop.train` with these settings. The job's `device` says where workers run."""
    import ray
    import ray.train.torch

    from moray.pipelines.pretrain.loop import train_steps

    base: Any = ray.train.torch.TorchTrainer

    class Trainer(base):
        # Not public: where Ray no longer asks for it, nothing is left out.
        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in UNUSED]

        # Not public either. Ray Train would put a handler of its own under SIGINT and leave it there: it swallows what
        # ends a step that can never start, and Ctrl-C in the steps that follow.
        def _register_sigint_handler(self, controller: Any) -> None:
            self._controller = controller

        def abort(self) -> None:
            """Has the controller stop the workers, and ends it; nothing if it was not started."""
            if (controller := getattr(self, "_controller", None)) is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(controller.abort.remote(), timeout=_ABORT_SECONDS)
                ray.kill(controller)  # and with it what it waits for: it does not hear while it waits for room

    config, gpu = job.config, job.config.device == "gpu"
    cpus = cpu_share(config, topology.cpus)
    scaling: Any = ray.train.ScalingConfig
    return Trainer(
        train_steps,
        train_loop_config=settings,
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=scaling(
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if gpu else {})},
            elastic_resize_monitor_interval_s=config.resize_seconds,
        ),
        run_config=ray.train.RunConfig(
            name=job.step,
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )


def _reason(error: Exception) -> str:
    """The last line that says something in Ray's chain of causes."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else error.__cause__ or error
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(inner).__name__
