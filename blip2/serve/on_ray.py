"""The same API on Ray Serve, where one machine is not enough: Ray starts the replicas, balances and restarts them.

    serve run blip2.serve.on_ray:app model=opt-6.7b-coco replicas=4 api_key_file=/etc/blip2/keys

Each replica is a whole server: an engine and the application around it. Connections, and so the deadlines of slow
clients, are Ray's; all limits of the application itself are kept.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray import serve

from blip2.serve.keys import Keys
from blip2.serve.limits import Limits


@serve.deployment
@serve.ingress()  # the application is built on the replica
class Replica:
    """One model, on one machine."""

    def __init__(self, model: str, api_key_file: str | None, allow_host: str | None, limits: Limits) -> None:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # read once, when these import torch
        import blip2
        from blip2.serve.app import LOOPBACK, build_app
        from blip2.serve.batching_engine import Engine
        from blip2.serve.logs import log_to_stderr

        log_to_stderr(own_process=False)
        self._engine = Engine(lambda: blip2.load(model), limits)
        self._app = build_app(
            self._engine,
            model=Path(model).name,
            keys=None if api_key_file is None else Keys.load(api_key_file),
            hosts=LOOPBACK if allow_host is None else LOOPBACK | {allow_host},
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises."""
        if self._engine.failure is not None or (self._engine.loaded.is_set() and not self._engine.alive):
            raise RuntimeError("the model failed to load, or its engine has stopped")


def app(args: dict[str, str]) -> serve.Application:
    """The application for `serve run`.

    Args:
        args: `model` (default: the one that ships), `replicas` (1), `cpus` and `gpus` of each (1, 0), `api_key_file`,
            `allow_host`, and any of `Limits` by its name.

    Raises:
        ValueError: an argument that is none of these.
    """
    settings = dict(args)
    model, replicas = settings.pop("model", "default"), int(settings.pop("replicas", "1"))
    resources = {"num_cpus": float(settings.pop("cpus", "1")), "num_gpus": float(settings.pop("gpus", "0"))}
    keys, host = settings.pop("api_key_file", None), settings.pop("allow_host", None)
    limits = Limits().changed(f"{name}={value}" for name, value in settings.items())
    deployment = Replica.options(  # type: ignore[attr-defined]
        num_replicas=replicas, max_ongoing_requests=limits.requests, ray_actor_options=resources
    )
    application: serve.Application = deployment.bind(model, keys, host, limits)
    return application
