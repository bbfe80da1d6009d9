"""A run on several nodes: the first runs the recipe, the others train along in its stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flows import console
from prosparse_core.distributed import nodes
from prosparse_core.distributed.nodes import Leader
from prosparse_core.recipe import Recipe
from prosparse_core.store import canonical_json, sha256_text
from tasks.step import Finished


def is_follower(recipe: Recipe) -> bool:
    """Whether this node trains along in a run that another one leads.

    Raises:
        BadInput: nothing says which node this is.
    """
    place = nodes.place(recipe.runtime)
    return place is not None and not place.is_first


@contextlib.contextmanager
def leading(recipe: Recipe) -> Iterator[Leader | None]:
    """Lead the other nodes of a recipe through a run; None when there are none."""
    place = nodes.place(recipe.runtime)
    if place is None:
        yield None
        return
    leader = Leader(place, _digest(recipe))
    status = "failed"
    try:
        yield leader
        status = "done"
    except Finished:  # stopped where it was told to
        status = "done"
        raise
    finally:
        leader.end(status)


def follow(recipe: Recipe) -> None:
    """Train along until node 0's run is over.

    Raises:
        ProSparseError: see :func:`prosparse_core.distributed.nodes.follow`.
    """
    from prosparse_core.distributed.launch import join

    place = nodes.place(recipe.runtime)
    assert place is not None
    console.say(f"node {place.rank} of {place.count}: training along with {place.host}:{place.port}")
    nodes.follow(place, _digest(recipe), lambda call, watch: join(place, call, watch))
    console.say(f"node {place.rank}: the run of node 0 is done")


def _digest(recipe: Recipe) -> str:
    """Of what must be the same on all nodes."""
    from prosparse_core.distributed.ranks import code_digest

    part = recipe.model_dump(mode="json", exclude={"runtime", "hardware"})
    shared = recipe.runtime.model_dump(mode="json", exclude={"node_rank", "rendezvous"})
    return sha256_text(canonical_json([part, shared, code_digest()]))
