"""Defenses that look at the private records again say so where they are not handed them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from defenses.client.censor import Censor
from defenses.client.outpost import Outpost
from defenses.client.soteria import Soteria
from simulator import lookup
from simulator.defense import ClientContext, Defense
from simulator.rng import stream
from simulator.types import Update

LOOKING: dict[str, Defense] = {"censor": Censor(), "outpost": Outpost(), "soteria": Soteria(layer="head")}


def test_they_are_all_that_look_again() -> None:
    shipped = [lookup.get("defenses", name) for name in lookup.names("defenses")]
    assert {cls.name for cls in shipped if cls.looks_again and cls.__module__.startswith("defenses.")} == set(LOOKING)


@pytest.mark.parametrize("name", LOOKING)
def test_without_the_clients_own_data_it_refuses_by_name(name: str) -> None:
    context, tensors = ClientContext(client=0, round=1, batch_size=1, rng=stream(0)), {"head.weight": torch.ones(2, 2)}
    looking = LOOKING[name]
    act = partial(looking.on_step, tensors) if name == "outpost" else partial(looking.on_update, Update("gradient", tensors))
    with pytest.raises(ValueError, match=rf"^context\.private must be there for {name}, got None\. Let clients\.local hand it over\.$"):
        act(context)
