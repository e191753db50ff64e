"""Functions run in Ray tasks: once per item, or once on each node."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from distal.cluster.nodes import n_cpus, workers
from distal.errors import DistalError

STUCK_S = 600.0
_MAX_SILENT = 3

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_tasks(
    work: Callable[[_Item], _Result], items: Sequence[_Item], *, stuck_after: float = STUCK_S
) -> Iterator[_Result]:
    """Run `work` on every item in Ray tasks, a bounded number at a time, and yield results as they finish.

    Ray would wait for ever for a process that is stopped. After `stuck_after` seconds without a result, the running
    items are therefore given to other processes as well, and the first result of each counts.

    Args:
        work: may run twice for an item.

    Raises:
        DistalError: no result for `stuck_after` seconds, several times in a row.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(lambda shared, item: shared(item))
    shared = ray.put(work)
    waiting, missing = deque(range(len(items))), set(range(len(items)))
    running: dict[Any, int] = {}  # the index of its item
    silent = 0
    while missing:
        window = 2 * n_cpus()
        while waiting and len(running) < window:
            place = waiting.popleft()
            running[task.remote(shared, items[place])] = place
        ready, _ = ray.wait(list(running), timeout=stuck_after)
        silent = 0 if ready else silent + 1
        if silent == _MAX_SILENT:
            raise DistalError(
                f"no task has answered for {_MAX_SILENT * stuck_after:.0f} s, and {len(missing)} are left; "
                "look at the nodes with `ray status`, and give the command again"
            )
        if silent:
            running |= {task.remote(shared, items[place]): place for place in set(running.values())}
        for place in {running[ref] for ref in ready} & missing:
            try:
                result = ray.get(next(ref for ref in ready if running[ref] == place))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            missing.remove(place)
            yield result
        running = {ref: place for ref, place in running.items() if place in missing}


def on_each_node(work: Callable[[], _Result], timeout_s: float) -> dict[str, _Result | Exception]:
    """Run `work` once on every node that has a CPU or a GPU, busy or not.

    Returns:
        For each node, by name, the result or the exception: what `work` raised, or a TimeoutError after `timeout_s`.
        A node that has died meanwhile is left out.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(lambda: work())
    nodes: dict[Any, tuple[str, str]] = {}  # id and name
    for node_id, name in workers().items():
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        nodes[task.options(scheduling_strategy=there).remote()] = (node_id, name)
    finished, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=timeout_s)
    results: dict[str, _Result | Exception] = {}
    for ref, (node_id, name) in nodes.items():
        if ref not in finished:
            ray.cancel(ref, force=True)
            results[name] = TimeoutError(f"no answer within {timeout_s:.0f} s")
            continue
        try:
            results[name] = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            results[name] = error.cause
        except ray.exceptions.RayError as error:
            if node_id in workers():
                results[name] = error
    return results
