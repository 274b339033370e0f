"""The whole data set: its scenes, by several processes, put together and written to its folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from q3d_plugin.errors import Q3DError
from q3d_plugin.toy_nuscenes import tables
from q3d_plugin.toy_nuscenes.generate import CHANNELS, SceneWriter
from q3d_plugin.toy_nuscenes.profiles import PROFILES
from q3d_plugin.toy_nuscenes.road import ROAD_HALF_WIDTH

# To be raised whenever the same arguments give other data.
GENERATOR_VERSION = 1
MARKER = 'toy_nuscenes.json'


def _write_scene(
    task: tuple[int, str], root: Path, seed: int, keyframes: int, profile: str
) -> tuple[dict, np.ndarray]:
    """One unit of work for a process."""
    writer = SceneWriter(root, seed, task[0], task[1], keyframes, PROFILES[profile])
    return writer.write(), writer.road()


def write_dataset(root: Path, arguments: dict, processes: int = 1) -> None:
    """Writes a whole set into an existing empty folder.

    Args:
        root: The folder.
        arguments: `seed`, `train_scenes`, `val_scenes` and `frames`, and `profile` where it is another one
            than the default.
        processes: Number of processes; the data does not depend on it.
    """
    for channel, modality in CHANNELS.items():
        (root / 'samples' / channel).mkdir(parents=True)
        if modality == 'lidar':
            (root / 'sweeps' / channel).mkdir(parents=True)
    seed = arguments['seed']
    names = tables.TRAIN_SCENES[: arguments['train_scenes']] + tables.VAL_SCENES[: arguments['val_scenes']]
    # Numbered by their place in the full set, so that a scene does not change with how many others there are.
    every = tables.TRAIN_SCENES + tables.VAL_SCENES
    tasks = [(every.index(name), name) for name in names]
    profile = arguments.get('profile', 'default')
    work = partial(_write_scene, root=root, seed=seed, keyframes=arguments['frames'], profile=profile)
    progress = partial(tqdm, total=len(tasks), desc='scenes', unit='scene')
    if processes > 1 and len(tasks) > 1:
        with get_context('fork').Pool(min(processes, len(tasks))) as pool:
            parts = list(progress(pool.imap(work, tasks)))
    else:
        parts = list(progress(map(work, tasks)))

    merged: dict[str, list[dict]] = {name: [] for name in tables.TABLES}
    for part, _ in parts:
        for name, records in part.items():
            merged[name] += records
    merged.update(tables.fixed_tables(seed, CHANNELS))
    roads = [road for _, road in parts]
    merged['map'] = tables.write_maps(root, seed, merged['log'], roads, 2 * ROAD_HALF_WIDTH)
    tables.write_tables(root, merged)
    marker = {'generator_version': GENERATOR_VERSION, **arguments}
    (root / MARKER).write_text(json.dumps(marker, indent=2) + '\n')


def _read_marker(out: Path) -> dict | None:
    """What an existing toy set was made from, None for anything else."""
    try:
        return json.loads((out / MARKER).read_text())
    except (OSError, ValueError):
        return None


def check_arguments(arguments: dict) -> None:
    """Refuses what the generator cannot do.

    Args:
        arguments: `seed`, `train_scenes`, `val_scenes` and `frames`, and `profile` where it is another one
            than the default.

    Raises:
        Q3DError: A number is out of its range, or there is no such profile.
    """
    limits = {
        'seed': (0, 2**31 - 1),
        'train_scenes': (1, len(tables.TRAIN_SCENES)),
        'val_scenes': (1, len(tables.VAL_SCENES)),
        'frames': (1, 40),
    }
    for name, (low, high) in limits.items():
        if not low <= arguments[name] <= high:
            option = name.replace('_', '-')
            raise Q3DError(f'--{option}: {arguments[name]} was given; {low} to {high} would work')
    profile = arguments.get('profile', 'default')
    if profile not in PROFILES:
        raise Q3DError(f'--profile: {profile!r} was given; {" or ".join(PROFILES)} would work')


def make_dataset(out: Path, arguments: dict, processes: int = 1) -> bool:
    """Makes sure that a folder holds a set: generates it, unless the same set is there already.

    Another toy set is replaced, with everything that was added to it; any other content is left alone.

    Args:
        out: The folder of the set, which appears whole or not at all.
        arguments: `seed`, `train_scenes`, `val_scenes` and `frames`, and `profile` where it is another one
            than the default.
        processes: Number of processes; the data does not depend on it.

    Returns:
        bool: Whether it was generated now.

    Raises:
        Q3DError: An argument is out of its range, or the folder holds something else.
    """
    check_arguments(arguments)
    given, out = out, out.resolve()
    if out.exists() and not out.is_dir():
        raise Q3DError(f'--out: {str(given)!r} is a file; a folder would work')
    marker = _read_marker(out)
    if marker == {'generator_version': GENERATOR_VERSION, **arguments}:
        return False
    if marker is None and out.exists() and any(out.iterdir()):
        raise Q3DError(f'--out: {str(given)!r} holds something that is no toy set; it is not overwritten')
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written next to its place and renamed at the end: an interrupted run leaves no half set behind.
    work = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    try:
        new = work / 'new'
        new.mkdir()
        write_dataset(new, arguments, processes)
        if out.exists():
            out.rename(work / 'old')
        new.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return True
