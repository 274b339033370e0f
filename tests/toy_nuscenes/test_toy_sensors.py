"""Ray casting, rendering and placement against slow or independent references."""

import cv2
import numpy as np
import pytest

from q3d_plugin.toy_nuscenes import camera, lidar
from q3d_plugin.toy_nuscenes.catalog import CLASSES, object_parts
from q3d_plugin.toy_nuscenes.generate import SceneWriter, calibrate
from q3d_plugin.toy_nuscenes.geometry import (
    matrix_to_quaternion,
    points_in_box,
    quaternion_to_matrix,
    rectangles_overlap,
    rotation_x,
    rotation_z,
)
from q3d_plugin.toy_nuscenes.placement import make_scene
from q3d_plugin.toy_nuscenes.scene import EGO_CENTER_AHEAD, Solids


@pytest.fixture(scope='module')
def scene():
    return make_scene(np.random.default_rng(7), np.array([200.0, 200.0]), 8)


def test_quaternions_round_trip():
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix = (
            rotation_z(rng.uniform(-4, 4)) @ rotation_x(rng.uniform(-4, 4)) @ rotation_z(rng.uniform(-4, 4))
        )
        quaternion = matrix_to_quaternion(matrix)
        assert np.isclose(np.linalg.norm(quaternion), 1)
        assert np.allclose(quaternion_to_matrix(quaternion), matrix)


def test_overlap_matches_sampled_points():
    rng = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, 41)] * 2), -1).reshape(-1, 2)
    agree = 0
    for _ in range(200):
        pose_a, pose_b = rng.uniform(-3, 3, (2, 3))
        size_a, size_b = rng.uniform(0.5, 4, (2, 2))
        points = (grid * size_a) @ rotation_z(pose_a[2])[:2, :2].T + pose_a[:2]
        local = (points - pose_b[:2]) @ rotation_z(pose_b[2])[:2, :2]
        sampled = (np.abs(local) <= size_b / 2).all(1).any()
        exact = rectangles_overlap(pose_a, size_a, pose_b, size_b)
        assert exact or not sampled
        agree += exact == sampled
    assert agree >= 195


def box_hit(origin, ray, half):
    """Where a ray meets a box: tries all six faces, one by one."""
    best = np.inf
    for axis in range(3):
        for sign in (-1, 1):
            if ray[axis] == 0:
                continue
            t = (sign * half[axis] - origin[axis]) / ray[axis]
            spot = origin + t * ray
            others = [i for i in range(3) if i != axis]
            if t > 0 and all(abs(spot[i]) <= half[i] for i in others):
                best = min(best, t)
    return best


def test_box_intersection_matches_face_by_face():
    rng = np.random.default_rng(2)
    half = np.array([1.0, 2.0, 0.7])
    origin = np.array([5.0, -4.0, 2.0])
    rays = rng.normal(size=(300, 3)) - origin / 4
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    distance, cosine = lidar.intersect_box(origin, rays, half)
    assert np.allclose(distance, [box_hit(origin, ray, half) for ray in rays])
    assert 30 < np.isfinite(distance).sum() < 270
    assert ((cosine >= 0) & (cosine <= 1)).all()


def test_cylinder_intersection_lies_on_the_surface():
    rng = np.random.default_rng(3)
    half = np.array([0.8, 0.8, 1.5])
    origin = np.array([4.0, 3.0, 2.5])
    targets = rng.uniform(-1, 1, (500, 3)) * [0.7, 0.7, 1.4]
    rays = targets - origin
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    distance, _ = lidar.intersect_cylinder(origin, rays, half)
    inside = np.hypot(targets[:, 0], targets[:, 1]) < 0.8
    # A ray towards a point within the solid meets it, and does so before that point.
    assert (distance[inside] < np.linalg.norm(targets - origin, axis=1)[inside]).all()
    spot = origin + distance[inside, None] * rays[inside]
    on_side = np.isclose(np.hypot(spot[:, 0], spot[:, 1]), 0.8) & (np.abs(spot[:, 2]) <= 1.5 + 1e-9)
    on_top = np.isclose(spot[:, 2], 1.5) & (np.hypot(spot[:, 0], spot[:, 1]) <= 0.8 + 1e-9)
    assert (on_side | on_top).all() and on_side.any() and on_top.any()


def wall_and_box():
    """A wall 10 m ahead of a sensor at the origin, as background, and behind it a box, as instance 0."""
    return Solids(
        center=np.array([[0.0, 10.0, 0.0], [0.0, 20.0, 0.0]]),
        half=np.array([[3.0, 0.25, 3.0], [2.0, 2.0, 2.0]]),
        yaw=np.zeros(2),
        round=np.zeros(2, bool),
        intensity=np.array([50.0, 200.0]),
        color=np.array([[0.0, 0.0, 0.0], [255.0, 0.0, 0.0]]),
        owner=np.array([-1, 0]),
    )


def test_walls_occlude():
    ground = np.array([-50.0, 0.0, 0.0])
    solids = wall_and_box()
    sweep = lidar.cast(solids, 1, ground, np.zeros(3), np.eye(3), np.random.default_rng(0))
    assert sweep.alone[0] > 20 and sweep.seen[0] == 0
    assert np.isclose(sweep.points[:, 1], 9.75, atol=0.15).all()
    solids.center[0, 0] = 30.0
    sweep = lidar.cast(solids, 1, ground, np.zeros(3), np.eye(3), np.random.default_rng(0))
    assert sweep.alone[0] == sweep.seen[0] > 20


def test_sweep_matches_a_ray_at_a_time(scene):
    """The culling by azimuth must not lose hits: casts against all solids without it."""
    solids = scene.solids(1.0)
    position, rotation = scene.ego_pose(1.0)
    origin = position + rotation @ np.array([0.94, 0.0, 1.84])
    rotation = rotation @ rotation_z(-np.pi / 2)
    ground = np.array([scene.ground[0] - scene.ground[1:] @ scene.origin, *scene.ground[1:]])
    sweep = lidar.cast(solids, len(scene.instances), ground, origin, rotation, np.random.default_rng(0))
    rays = sweep.points[:, :3].astype(float) @ rotation.T
    measured = np.linalg.norm(rays, axis=1)
    rays /= measured[:, None]
    best = np.full(len(rays), np.inf)
    owner = np.full(len(rays), -1)
    height = origin[2] - ground[0] - ground[1:] @ origin[:2]
    descent = rays[:, 2] - rays[:, :2] @ ground[1:]
    down = descent < -1e-6
    best[down] = -height / descent[down]
    for i in range(len(solids.yaw)):
        to_solid = rotation_z(-solids.yaw[i])
        meet = lidar.intersect_cylinder if solids.round[i] else lidar.intersect_box
        distance, _ = meet(to_solid @ (origin - solids.center[i]), rays @ to_solid.T, solids.half[i])
        nearer = distance < best
        best[nearer], owner[nearer] = distance[nearer], solids.owner[i]
    # Rays that graze an edge may fall on either side of it: the points are rounded to float32.
    same = np.abs(best - measured) < 6 * lidar.RANGE_NOISE
    assert same.mean() > 0.999
    assert (owner == sweep.owner).mean() > 0.999


def test_parts_stay_inside_their_box():
    for name, cls in CLASSES.items():
        for rider in (False, True) if cls.rider else (False,):
            size = np.array(cls.size_lwh)
            if rider:
                size[2] = cls.rider_height
            parts = object_parts(name, size, rider)
            for center, half in zip(parts['center'], parts['half']):
                assert (half > 0).all()
                assert (np.abs(center[:2]) + half[:2] <= size[:2] / 2 - 0.049).all(), name
                assert center[2] - half[2] >= -size[2] / 2 - 1e-9
                assert center[2] + half[2] <= size[2] / 2 - 0.049


def test_nothing_collides(scene):
    assert len(scene.instances) > 40
    for t in np.arange(0, scene.duration + 0.01, 0.25):
        centers, sizes, yaws = scene.boxes(t)
        position, rotation = scene.ego_pose(t)
        ego = np.append((position + rotation[:, 0] * EGO_CENTER_AHEAD)[:2], np.arctan2(*rotation[1::-1, 0]))
        poses = np.concatenate([np.column_stack([centers[:, :2], yaws]), ego[None]])
        footprint = np.concatenate([sizes[:, :2], [[4.1, 1.8]]])
        for i in range(len(poses)):
            hit = rectangles_overlap(poses[i], footprint[i], poses[i + 1 :], footprint[i + 1 :])
            assert not hit.any()


@pytest.mark.parametrize('scale', [2, 4])
def test_images_show_the_nearest_solid_at_each_pixel(scene, scale):
    """Casts one ray through each of some pixels: the solid it meets first gives the colour, up to shading."""
    solids = scene.solids(1.0)
    rng = np.random.default_rng(0)
    solids.color[:] = rng.uniform(60, 250, solids.color.shape)
    position, rotation = scene.ego_pose(1.0)
    position = position + rotation @ np.array([1.7, 0.0, 1.5])
    rotation = rotation @ np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    intrinsic = np.array([[810.0, 0, 800], [0, 810.0, 450], [0, 0, 1]])
    normal = np.array([-scene.ground[1], -scene.ground[2], 1.0])
    around = float(scene.ego.travelled(np.array(1.0)))
    image = camera.render(
        solids,
        scene.road,
        around,
        normal / np.linalg.norm(normal),
        scene.ground_height,
        rotation,
        position,
        camera.shrunk(intrinsic, scale),
        scale,
    )
    assert image.shape == (900 // scale, 1600 // scale, 3)
    pixels = rng.uniform([0, 300], [1600, 600], (4000, 2))
    rays = np.column_stack([pixels, np.ones(len(pixels))]) @ np.linalg.inv(intrinsic).T @ rotation.T
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    ground = scene.ground_height(position[:2])
    descent = rays[:, 2] - rays[:, :2] @ scene.ground[1:]
    best = np.where(descent < 0, (ground - position[2]) / np.minimum(descent, -1e-9), np.inf)
    first = np.full(len(rays), -1)
    for i in range(len(solids.yaw)):
        to_solid = rotation_z(-solids.yaw[i])
        meet = lidar.intersect_cylinder if solids.round[i] else lidar.intersect_box
        distance, _ = meet(to_solid @ (position - solids.center[i]), rays @ to_solid.T, solids.half[i])
        nearer = distance < np.minimum(best, camera.FAR)
        best[nearer], first[nearer] = distance[nearer], i
    hit = first >= 0
    # The pixel of the small image that covers this one.
    column, row = (pixels[hit] // scale).astype(int).T
    shown = image[row, column].astype(float)
    expected = solids.color[first[hit]]
    shown /= np.linalg.norm(shown, axis=1, keepdims=True)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    # Not all: cylinders are drawn as prisms, and edges are two pixels wide.
    assert hit.sum() > 500
    assert ((shown * expected).sum(1) > 0.9995).mean() > 0.95


def test_images_show_the_annotated_boxes(nusc, root):
    """Where a LiDAR point of an object projects into an image, the image has the colour of that object."""
    module = pytest.importorskip('pyquaternion')
    scene = nusc.scene[0]
    writer = SceneWriter(root, 0, 0, scene['name'], 3)
    by_token = {writer.token('instance', i): x for i, x in enumerate(writer.scene.instances)}
    sample = nusc.get('sample', nusc.get('sample', scene['first_sample_token'])['next'])

    def poses(token):
        record = nusc.get('sample_data', token)
        for table in ('calibrated_sensor', 'ego_pose'):
            pose = nusc.get(table, record[f'{table}_token'])
            yield module.Quaternion(pose['rotation']).rotation_matrix, np.array(pose['translation'])

    key = sample['data']['LIDAR_TOP']
    points = np.fromfile(nusc.get_sample_data_path(key), np.float32).reshape(-1, 5)[:, :3].astype(float)
    for matrix, shift in poses(key):
        points = points @ matrix.T + shift
    matches = []
    for channel in camera.RIG:
        token = sample['data'][channel]
        image = cv2.imread(nusc.get_sample_data_path(token))[..., ::-1]
        assert image.shape == (900, 1600, 3)
        calibration = nusc.get('calibrated_sensor', nusc.get('sample_data', token)['calibrated_sensor_token'])
        for annotation in map(lambda t: nusc.get('sample_annotation', t), sample['anns']):
            instance = by_token[annotation['instance_token']]
            if instance.name not in ('car', 'bus', 'truck', 'barrier', 'trailer'):
                continue
            yaw = module.Quaternion(annotation['rotation']).yaw_pitch_roll[0]
            inside = points_in_box(points, annotation['translation'], instance.size_lwh, yaw)
            local = points[inside]
            for matrix, shift in reversed(list(poses(token))):
                local = (local - shift) @ matrix
            local = local[local[:, 2] > 1]
            pixels = local @ np.array(calibration['camera_intrinsic']).T
            pixels = pixels[:, :2] / pixels[:, 2:]
            pixels = pixels[((pixels > 4) & (pixels < (1596, 896))).all(1)].astype(int)
            shown = image[pixels[:, 1], pixels[:, 0]].astype(float)
            shown /= np.maximum(np.linalg.norm(shown, axis=1, keepdims=True), 1)
            color = instance.color / np.linalg.norm(instance.color)
            matches += (shown @ color > 0.97).tolist()
    # The sensors sit in different places: what one sees, another object may hide from the other.
    assert len(matches) > 200
    assert np.mean(matches) > 0.85


def test_small_images_have_the_intrinsics_that_belong_to_them():
    large, small = (calibrate(np.random.default_rng(3), *scale) for scale in ((), (4,)))
    assert large.keys() == small.keys() and small['LIDAR_TOP'].intrinsic == []
    for channel in camera.RIG:
        assert large[channel].translation == small[channel].translation
        full, quarter = np.array(large[channel].intrinsic), np.array(small[channel].intrinsic)
        u, v = ((matrix @ [1.0, 0.5, 4.0])[:2] / 4.0 for matrix in (full, quarter))
        # The middle of a small pixel is the middle of the 4 x 4 large ones that it covers.
        np.testing.assert_allclose(v + 0.5, (u + 0.5) / 4, atol=1e-5)
