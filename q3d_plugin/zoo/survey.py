"""All configs of one or both frameworks, one after the other; equal models are run once."""

import contextlib
import fnmatch
import os
from collections.abc import Iterator, Sequence
from typing import Dict, List, NamedTuple, Tuple

from q3d_plugin.adapter import Adapter
from q3d_plugin.errors import Q3DError
from q3d_plugin.zoo.process import in_process
from q3d_plugin.zoo.rows import Row, with_forward_of

__all__ = ['Limits', 'chosen', 'survey']

Work = List[Tuple[Adapter, str]]
"""Configs with the adapters of their frameworks."""


class Limits(NamedTuple):
    """How far to go with each config.

    Attributes:
        forward: Whether to run the models.
        int8: Whether to calibrate on the frame and run in INT8, too.
        timeout: Seconds for one config.
        memory: GiB for one config.
    """

    forward: bool = True
    int8: bool = False
    timeout: float = 900
    memory: float = 6


def chosen(adapters: Sequence[Adapter], patterns: Sequence[str]) -> Work:
    """The configs that match one of some patterns.

    Args:
        adapters: Of the frameworks.
        patterns: Such as ``second/*``.

    Raises:
        Q3DError: A pattern matches none.
    """
    work = [(adapter, config) for adapter in adapters for config in adapter.configs()]
    for pattern in patterns:
        if not fnmatch.filter([config for _, config in work], pattern):
            raise Q3DError(f'--only: {pattern!r} matches none of the {len(work)} configs')
    return [(a, config) for a, config in work if any(fnmatch.fnmatch(config, p) for p in patterns)]


def signature_of(adapter: Adapter, config: str) -> str:
    """The adapter's signature of a config; that of no other where the config cannot be read."""
    with contextlib.suppress(Exception), open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        return adapter.signature(adapter.read(adapter.folder / config))
    return config


def survey(work: Work, done: Sequence[Row], limits: Limits) -> Iterator[Tuple[int, Row]]:
    """Examines configs, each in a process of its own.

    Args:
        work: The configs.
        done: Rows of an earlier run: their configs are passed over.
        limits: How far to go.

    Yields:
        tuple: The number of a config in ``work``, from 0, and its row.
    """
    known = {(r.framework, r.config): r for r in done}
    first: Dict[Tuple[str, str], Row] = {}
    for number, (adapter, config) in enumerate(work):
        key = (adapter.name, signature_of(adapter, config))
        twin = first.get(key)
        if (adapter.name, config) in known:
            first.setdefault(key, known[adapter.name, config])
            continue
        forward = limits.forward and twin is None
        row = in_process(adapter, config, forward, limits.int8, limits.timeout, limits.memory)
        row = row if twin is None else with_forward_of(row, twin)
        first.setdefault(key, row)
        yield number, row
