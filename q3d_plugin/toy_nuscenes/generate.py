"""One scene: its frames by every sensor, and its rows of all tables."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import cv2
import numpy as np

from q3d_plugin.toy_nuscenes import camera, lidar, tables
from q3d_plugin.toy_nuscenes.catalog import CLASSES
from q3d_plugin.toy_nuscenes.geometry import (
    matrix_to_quaternion,
    points_in_box,
    quaternion_to_matrix,
    rotation_x,
    rotation_z,
)
from q3d_plugin.toy_nuscenes.placement import make_scene
from q3d_plugin.toy_nuscenes.profiles import PROFILES, Profile
from q3d_plugin.toy_nuscenes.scene import KEYFRAME_PERIOD, SWEEP_PERIOD, Scene
from q3d_plugin.toy_nuscenes.tables import rounded, token

ANNOTATION_RANGE = 55.0
FIRST_TIMESTAMP = 1_532_402_900_000_000  # microseconds
CHANNELS = {'LIDAR_TOP': 'lidar', **dict.fromkeys(camera.RIG, 'camera')}
# From a camera (x right, y down, z forward) to a vehicle that looks the same way (x forward, z up).
CAMERA_AXES = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


class Mount:
    """Where a sensor sits on the vehicle, exactly as the table stores it."""

    def __init__(self, translation: np.ndarray, rotation: np.ndarray, intrinsic: np.ndarray | None) -> None:
        self.translation = rounded(translation)
        self.quaternion = rounded(matrix_to_quaternion(rotation), 9)
        self.rotation = quaternion_to_matrix(np.array(self.quaternion))
        self.intrinsic = [] if intrinsic is None else [rounded(row) for row in intrinsic]


def calibrate(rng: np.random.Generator, image_scale: int = 1) -> dict[str, Mount]:
    """The sensor rig of one log, every sensor a little off: no two vehicles are calibrated alike.

    Args:
        rng: Source of the deviations.
        image_scale: Images have the size of nuScenes divided by this.
    """
    tilt = rotation_x(np.deg2rad(rng.normal(0, 0.4)))
    mounts = {
        'LIDAR_TOP': Mount(
            np.array([0.94, 0.0, 1.84]) + rng.normal(0, 0.004, 3),
            rotation_z(np.deg2rad(-90 + rng.normal(0, 0.3))) @ tilt,
            None,
        )
    }
    for channel, (heading, position, focal, _) in camera.RIG.items():
        focal = focal + rng.normal(0, 3)
        cx, cy = 800 + rng.normal(0, 8), 480 + rng.normal(0, 8)
        rotation = rotation_z(np.deg2rad(heading + rng.normal(0, 0.4))) @ CAMERA_AXES
        rotation = rotation @ rotation_x(np.deg2rad(rng.normal(0, 0.3)))
        intrinsic = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
        if image_scale > 1:
            intrinsic = camera.shrunk(intrinsic, image_scale)
        mounts[channel] = Mount(np.array(position) + rng.normal(0, 0.01, 3), rotation, intrinsic)
    return mounts


def _chain(records: list[dict]) -> None:
    """Links records, in place, to the ones before and after them."""
    for i, record in enumerate(records):
        record['prev'] = records[i - 1]['token'] if i else ''
        record['next'] = records[i + 1]['token'] if i + 1 < len(records) else ''


class SceneWriter:
    """Records one scene: simulates its sensors, writes their files and collects the table records."""

    def __init__(
        self,
        root: Path,
        seed: int,
        index: int,
        name: str,
        keyframes: int,
        profile: Profile = PROFILES['default'],
    ) -> None:
        self.profile = profile
        self.root, self.seed, self.index, self.name, self.keyframes = root, seed, index, name, keyframes
        rng = np.random.default_rng(np.random.SeedSequence([seed, index, 0]))
        self.scene: Scene = make_scene(rng, tables.map_center(index), keyframes, profile)
        self.mounts = calibrate(rng, profile.image_scale)
        self.start = FIRST_TIMESTAMP + index * 1_000_000_000 + int(rng.integers(0, 1_000_000))
        date = datetime.fromtimestamp(self.start / 1e6, tz=timezone.utc)
        # 'n000' is no vehicle of nuScenes: names keep the pattern and yet show that the data is synthetic.
        self.logfile = f'n000-{date:%Y-%m-%d-%H-%M-%S}+0000'
        self.tables: dict[str, list[dict]] = {name: [] for name in tables.TABLES}

    def token(self, *parts: object) -> str:
        """Token of something in this scene."""
        return token(self.seed, self.name, *parts)

    def timestamp(self, t: float) -> int:
        """Time of the set in microseconds."""
        return self.start + round(t * 1e6)

    def sensor_pose(self, channel: str, pose: dict) -> tuple[np.ndarray, np.ndarray]:
        """Global position (3,) and rotation (3, 3) of a sensor, from the numbers that the tables store."""
        vehicle = quaternion_to_matrix(np.array(pose['rotation']))
        mount = self.mounts[channel]
        position = np.array(pose['translation']) + vehicle @ np.array(mount.translation)
        return position, vehicle @ mount.rotation

    def record(self, channel: str, t: float, keyframe: int, is_key: bool) -> tuple[dict, dict]:
        """Adds the `sample_data` and `ego_pose` records of one recording and returns them."""
        stamp = self.timestamp(t)
        key = self.token(channel, stamp)
        position, rotation = self.scene.ego_pose(t)
        pose = {
            'token': key,
            'timestamp': stamp,
            'rotation': rounded(matrix_to_quaternion(rotation), 9),
            'translation': rounded(position),
        }
        is_lidar = channel == 'LIDAR_TOP'
        folder, suffix = 'samples' if is_key else 'sweeps', '.pcd.bin' if is_lidar else '.jpg'
        data = {
            'token': key,
            'sample_token': self.token('sample', keyframe),
            'ego_pose_token': key,
            'calibrated_sensor_token': self.token('calibrated_sensor', channel),
            'timestamp': stamp,
            'fileformat': 'pcd' if is_lidar else 'jpg',
            'is_key_frame': is_key,
            'height': 0 if is_lidar else camera.HEIGHT // self.profile.image_scale,
            'width': 0 if is_lidar else camera.WIDTH // self.profile.image_scale,
            'filename': f'{folder}/{channel}/{self.logfile}__{channel}__{stamp}{suffix}',
            'prev': '',
            'next': '',
        }
        self.tables['ego_pose'].append(pose)
        self.tables['sample_data'].append(data)
        return data, pose

    def sweep(self, t: float, number: int, data: dict, pose: dict) -> lidar.Sweep:
        """Records a LiDAR sweep and writes its file."""
        scene = self.scene
        position, rotation = self.sensor_pose('LIDAR_TOP', pose)
        ground = np.array([scene.ground[0] - scene.ground[1:] @ scene.origin, *scene.ground[1:]])
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, self.index, 1, number]))
        result = lidar.cast(scene.solids(t), len(scene.instances), ground, position, rotation, rng)
        (self.root / data['filename']).write_bytes(result.points.tobytes())
        return result

    def images(self, t: float, keyframe: int) -> list[dict]:
        """Records and writes the six images of a keyframe at time `t`."""
        scene = self.scene
        # The objects stand where they are at the keyframe: annotations exist for that moment only, and
        # readers draw them into images without regard to the few milliseconds in between.
        solids = scene.solids(t)
        normal = np.array([-scene.ground[1], -scene.ground[2], 1.0])
        normal /= np.linalg.norm(normal)
        records = []
        for channel, (_, _, _, early) in camera.RIG.items():
            data, pose = self.record(channel, t - early, keyframe, True)
            position, rotation = self.sensor_pose(channel, pose)
            around = float(scene.ego.travelled(np.array(t - early)))
            intrinsic, scale = np.array(self.mounts[channel].intrinsic), self.profile.image_scale
            size = camera.WIDTH // scale, camera.HEIGHT // scale
            if scale < camera.SCALE:
                intrinsic, scale = camera.shrunk(intrinsic, camera.SCALE), camera.SCALE
            where = scene.ground_height, rotation, position, intrinsic, scale
            image = camera.render(solids, scene.road, around, normal, *where)
            if (image.shape[1], image.shape[0]) != size:
                image = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)
            (self.root / data['filename']).write_bytes(camera.encode(image, self.profile))
            records.append(data)
        return records

    def annotations(self, t: float, keyframe: int, pose: dict, sweep: lidar.Sweep) -> list[dict | None]:
        """One annotation per instance at a keyframe; None for those out of range."""
        scene = self.scene
        centers, sizes, yaws = scene.boxes(t)
        position, rotation = self.sensor_pose('LIDAR_TOP', pose)
        points = sweep.points[:, :3].astype(np.float64) @ rotation.T + position
        ego = np.array(pose['translation'])
        result = []
        for i, instance in enumerate(scene.instances):
            center, yaw = np.array(rounded(centers[i])), yaws[i]
            if np.linalg.norm(center[:2] - ego[:2]) > ANNOTATION_RANGE:
                result.append(None)
                continue
            quaternion = rounded([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)], 9)
            stored_yaw = 2 * np.arctan2(quaternion[3], quaternion[0])
            length, width, height = (float(v) for v in sizes[i])
            fraction = sweep.seen[i] / sweep.alone[i] if sweep.alone[i] else 0.0
            result.append(
                {
                    'token': self.token('annotation', keyframe, i),
                    'sample_token': self.token('sample', keyframe),
                    'instance_token': self.token('instance', i),
                    'visibility_token': tables.visibility_level(fraction),
                    'attribute_tokens': [token(self.seed, 'attribute', instance.attribute)]
                    if instance.attribute
                    else [],
                    'translation': center.tolist(),
                    'size': [width, length, height],
                    'rotation': quaternion,
                    'prev': '',
                    'next': '',
                    'num_lidar_pts': int(points_in_box(points, center, sizes[i], stored_yaw).sum()),
                    'num_radar_pts': 0,
                }
            )
        return result

    def add_instances(self, history: list[list[dict | None]]) -> None:
        """Turns the annotations of all keyframes into tracks, one per instance."""
        for i, instance in enumerate(self.scene.instances):
            column = [frame[i] for frame in history]
            seen = [k for k, record in enumerate(column) if record and record['num_lidar_pts'] > 0]
            if not seen:
                continue
            # As an annotator would: from the first to the last time there is something to see, and on through
            # short moments without. Long ones would only add boxes that every reader filters out.
            keep = sorted({n for k in seen for n in (k - 1, k, k + 1) if seen[0] <= n <= seen[-1]})
            track = [column[k] for k in keep if column[k]]
            _chain(track)
            self.tables['sample_annotation'] += track
            self.tables['instance'].append(
                {
                    'token': self.token('instance', i),
                    'category_token': token(self.seed, 'category', CLASSES[instance.name].category),
                    'nbr_annotations': len(track),
                    'first_annotation_token': track[0]['token'],
                    'last_annotation_token': track[-1]['token'],
                }
            )

    def write(self) -> dict[str, list[dict]]:
        """Records the whole scene and returns its part of the tables."""
        cv2.setNumThreads(1)
        chains: dict[str, list[dict]] = {channel: [] for channel in CHANNELS}
        history, samples = [], []
        per_keyframe = round(KEYFRAME_PERIOD / SWEEP_PERIOD)
        for keyframe in range(self.keyframes):
            for step in range(per_keyframe - 1, -1, -1):
                t = keyframe * KEYFRAME_PERIOD - step * SWEEP_PERIOD
                data, pose = self.record('LIDAR_TOP', t, keyframe, step == 0)
                sweep = self.sweep(t, keyframe * per_keyframe - step + per_keyframe, data, pose)
                chains['LIDAR_TOP'].append(data)
            for data, channel in zip(self.images(t, keyframe), camera.RIG):
                chains[channel].append(data)
            history.append(self.annotations(t, keyframe, pose, sweep))
            samples.append(
                {
                    'token': self.token('sample', keyframe),
                    'timestamp': self.timestamp(t),
                    'prev': '',
                    'next': '',
                    'scene_token': self.token('scene'),
                }
            )
        for chain in (*chains.values(), samples):
            _chain(chain)
        self.tables['sample'] = samples
        self.add_instances(history)
        for channel, mount in self.mounts.items():
            self.tables['calibrated_sensor'].append(
                {
                    'token': self.token('calibrated_sensor', channel),
                    'sensor_token': token(self.seed, 'sensor', channel),
                    'translation': mount.translation,
                    'rotation': mount.quaternion,
                    'camera_intrinsic': mount.intrinsic,
                }
            )
        self.tables['scene'].append(
            {
                'token': self.token('scene'),
                'log_token': self.token('log'),
                'nbr_samples': self.keyframes,
                'first_sample_token': samples[0]['token'],
                'last_sample_token': samples[-1]['token'],
                'name': self.name,
                'description': 'Synthetic street with all ten detection classes',
            }
        )
        self.tables['log'].append(
            {
                'token': self.token('log'),
                'logfile': self.logfile,
                'vehicle': 'n000',
                'date_captured': f'{datetime.fromtimestamp(self.start / 1e6, tz=timezone.utc):%Y-%m-%d}',
                'location': tables.location(self.index),
            }
        )
        return self.tables

    def road(self) -> np.ndarray:
        """Centre line (N, 2) of the part of the road that the map shows."""
        length = float(self.scene.ego.travelled(np.array(self.scene.duration)))
        return self.scene.road.pose(np.arange(-60.0, length + 60.0, 2.0))[:, :2]
