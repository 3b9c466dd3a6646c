"""Runs a Flower federation with the two apps it is handed, on one of three drivers; the observations are the same to the bit.

``inprocess`` needs no other process. ``simulation`` is Flower's simulation engine on Ray, ``deployment`` a SuperLink with one
SuperNode for each client on loopback; both start from an app directory, as ``flwr run`` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from simulator import config
from simulator.world import World

DEFAULT_WORLD: dict[str, Any] = {"data": "synthetic", "model": "linear", "federation": {"clients": 2}}
"""What a bare ``flwr run .`` runs: two clients, as many as Flower simulates unless told otherwise."""

Driver = Literal["inprocess", "simulation", "deployment"]


def run_config(world: World, out: Path) -> dict[str, Any]:
    """What both apps are told: the world as JSON, and where the server writes."""
    return {"world": json.dumps(config.standard(config.dump(world)), allow_nan=False), "out-dir": str(out.resolve())}


def read_world(settings: dict[str, Any]) -> World:
    """The world in ``context.run_config``; the default world where it is empty."""
    text = str(settings.get("world", ""))
    return config.build(World, json.loads(text) if text else DEFAULT_WORLD)


def run(world: World, out: Path, server_app: ServerApp, client_app: ClientApp, driver: Driver = "inprocess") -> None:
    """Run the federation of ``world``; the server writes its transcript to ``out``.

    Raises:
        FederationError: the federation could not be carried to its end; what was recorded stays in ``out``.
    """
    if driver == "inprocess":
        from simulator.inprocess import run_inprocess

        run_inprocess(server_app, client_app, world.federation.clients, run_config(world, out))
        return
    from simulator.superlink import run_deployment, run_simulation

    start = run_simulation if driver == "simulation" else run_deployment
    start(run_config(world, out), world.federation.clients, out)
