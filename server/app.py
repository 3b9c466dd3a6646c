"""The Flower ServerApp: an honest server that runs the federation, and a curious one that keeps what it saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.curious import CuriousGrid
from server.strategy import run_rounds
from simulator import config
from simulator.engine import read_world
from simulator.transcript import Transcript
from simulator.world import World

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds of the world; write the transcript where ``out-dir`` says."""
    torch.set_num_threads(1)
    world = read_world(dict(context.run_config))
    out = str(context.run_config.get("out-dir", ""))
    transcript = _transcript(Path(out), world) if out else None
    status = "failed"
    facts: dict[str, Any] = {}
    try:
        status, facts = run_rounds(CuriousGrid(grid, transcript), world)
    except Exception as error:
        facts = {"reason": f"{type(error).__name__}: {error}"}
        raise
    finally:
        if transcript is not None:
            transcript.close(status, facts)


def _transcript(out: Path, world: World) -> Transcript:
    """The model after a round is what the next one broadcasts."""
    federation = world.federation
    tested = range(federation.rounds - federation.record_models + 2, federation.rounds + 1)
    return Transcript(out, header(world), keep_rounds=federation.record_rounds, keep_models=tested)


def header(world: World) -> dict[str, Any]:
    """The public facts of a federation: what the server that runs it knows without looking at any upload. No seed."""
    schema = world.data.load().schema
    honest = world.tampering.method == "none"
    return {
        "model": config.dump(world.architecture),
        "schema_of_a_record": {"shape": list(schema.shape), "class_names": list(schema.class_names)},
        "federation": config.standard(config.dump(world.federation)),
        "training": config.dump(world.training),
        "defenses": config.standard(config.dump(world.defenses)),
        **({} if honest else {"adversary": "ACTIVE: not honest-but-curious", "tampering": config.dump(world.tampering)}),
    }
