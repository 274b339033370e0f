"""Records of the nuScenes tables. Tokens are hashes of what they name, so that they repeat run after run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np

from q3d_plugin.toy_nuscenes.catalog import ATTRIBUTES, CATEGORIES

VERSION = 'v1.0-mini'
TABLES = (
    'category',
    'attribute',
    'visibility',
    'instance',
    'sensor',
    'calibrated_sensor',
    'ego_pose',
    'log',
    'scene',
    'sample',
    'sample_data',
    'sample_annotation',
    'map',
)
# The scenes that `nuscenes.utils.splits` knows as mini_train and mini_val.
TRAIN_SCENES = (
    'scene-0061',
    'scene-0553',
    'scene-0655',
    'scene-0757',
    'scene-0796',
    'scene-1077',
    'scene-1094',
    'scene-1100',
)
VAL_SCENES = ('scene-0103', 'scene-0916')
LOCATIONS = ('singapore-onenorth', 'boston-seaport', 'singapore-queenstown', 'singapore-hollandvillage')
VISIBILITY_BINS = (0.4, 0.6, 0.8)
MAP_TILE = 400.0  # metres; every scene has a square of its own, stacked along y
MAP_RESOLUTION = 0.1  # metres per pixel, the one the devkit takes for granted


def token(*parts: object) -> str:
    """Token of 32 hexadecimal characters for what the parts name."""
    return hashlib.md5('/'.join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def visibility_level(fraction: float) -> str:
    """Visibility token, '1' to '4', of the fraction of an object that can be seen."""
    return str(1 + int(np.searchsorted(VISIBILITY_BINS, fraction, side='right')))


def rounded(values: np.ndarray, digits: int = 6) -> list[float]:
    """Plain floats as they are stored; six digits are micrometres."""
    return [round(float(v), digits) for v in np.ravel(values)]


def fixed_tables(seed: int, channels: dict[str, str]) -> dict[str, list[dict]]:
    """The tables that do not depend on the scenes.

    Args:
        seed: Seed of the set.
        channels: Modality of each sensor channel.

    Returns:
        Tables `category`, `attribute`, `visibility` and `sensor`.
    """
    labels = ('v0-40', 'v40-60', 'v60-80', 'v80-100')
    return {
        'category': [
            {'token': token(seed, 'category', k), 'name': k, 'description': v} for k, v in CATEGORIES.items()
        ],
        'attribute': [
            {'token': token(seed, 'attribute', k), 'name': k, 'description': v} for k, v in ATTRIBUTES.items()
        ],
        'visibility': [
            {'token': str(i + 1), 'level': k, 'description': f'visibility of the object is {k[1:]} percent'}
            for i, k in enumerate(labels)
        ],
        'sensor': [
            {'token': token(seed, 'sensor', k), 'channel': k, 'modality': v} for k, v in channels.items()
        ],
    }


def map_center(index: int) -> np.ndarray:
    """Where scene number `index` lies on the map of its location (2,), in metres."""
    return np.array([0.5, 0.5 + index // len(LOCATIONS)]) * MAP_TILE


def location(index: int) -> str:
    """Location of scene number `index`."""
    return LOCATIONS[index % len(LOCATIONS)]


def write_maps(root: Path, seed: int, logs: list[dict], roads: list[np.ndarray], width: float) -> list[dict]:
    """Draws the road masks, one PNG per location, and returns the `map` table.

    Args:
        root: Folder of the set.
        seed: Seed of the set.
        logs: The `log` table, one record per scene.
        roads: Centre line (N, 2) of the road of each log.
        width: Width of the roads in metres.

    Returns:
        Records of the `map` table.
    """
    (root / 'maps').mkdir()
    records = []
    for name in LOCATIONS:
        here = [i for i, log in enumerate(logs) if log['location'] == name]
        tiles = max((int(roads[i][:, 1].mean() // MAP_TILE) + 1 for i in here), default=1)
        side = round(MAP_TILE / MAP_RESOLUTION)
        # One byte a pixel although there are two values: the devkit compares with 255.
        mask = np.zeros((side * tiles, side), np.uint8)
        for i in here:
            # The first row of the picture is the northern end.
            pixels = np.column_stack([roads[i][:, 0], MAP_TILE * tiles - roads[i][:, 1]]) / MAP_RESOLUTION
            line = np.round(pixels).astype(np.int32)[:, None]
            cv2.polylines(mask, [line], False, 255, round(width / MAP_RESOLUTION))
        key = token(seed, 'map', name)
        filename = f'maps/{key}.png'
        ok, data = cv2.imencode('.png', mask, [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE])
        if not ok:
            raise RuntimeError('OpenCV could not encode a map as PNG')
        (root / filename).write_bytes(data.tobytes())
        records.append(
            {
                'category': 'semantic_prior',
                'token': key,
                'filename': filename,
                'log_tokens': [logs[i]['token'] for i in here],
            }
        )
    return records


def write_tables(root: Path, tables: dict[str, list[dict]]) -> None:
    """Writes all tables as JSON under `root/v1.0-mini`."""
    folder = root / VERSION
    folder.mkdir()
    for name in TABLES:
        (folder / f'{name}.json').write_text(json.dumps(tables[name], indent=0))
