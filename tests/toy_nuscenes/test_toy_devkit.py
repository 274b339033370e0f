"""The set as the nuScenes devkit sees it."""

import json

import numpy as np
import pytest

pytest.importorskip('nuscenes.nuscenes')

from nuscenes.eval.detection.utils import category_to_detection_name, detection_name_to_rel_attributes
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box
from nuscenes.utils.splits import mini_train, mini_val
from pyquaternion import Quaternion

from q3d_plugin.toy_nuscenes import tables
from q3d_plugin.toy_nuscenes.catalog import CLASSES

REFERENCES = {
    'sample_token': 'sample',
    'scene_token': 'scene',
    'ego_pose_token': 'ego_pose',
    'calibrated_sensor_token': 'calibrated_sensor',
    'sensor_token': 'sensor',
    'instance_token': 'instance',
    'visibility_token': 'visibility',
    'category_token': 'category',
    'log_token': 'log',
    'first_sample_token': 'sample',
    'last_sample_token': 'sample',
    'first_annotation_token': 'sample_annotation',
    'last_annotation_token': 'sample_annotation',
}


@pytest.fixture(scope='module')
def raw(root):
    return {name: json.loads((root / 'v1.0-mini' / f'{name}.json').read_text()) for name in tables.TABLES}


def test_scene_names_are_those_of_the_devkit():
    assert list(tables.TRAIN_SCENES) == mini_train
    assert list(tables.VAL_SCENES) == mini_val


def test_tables_refer_to_what_exists(raw, root):
    known = {name: {r['token'] for r in records} for name, records in raw.items()}
    for name, records in raw.items():
        assert len(known[name]) == len(records) > 0
        for record in records:
            assert name == 'visibility' or len(record['token']) == 32
            for field, target in REFERENCES.items():
                assert field not in record or record[field] in known[target], (name, field)
            for field in ('prev', 'next'):
                assert record.get(field, '') == '' or record[field] in known[name]
            assert set(record.get('attribute_tokens', ())) <= known['attribute']
            assert set(record.get('log_tokens', ())) <= known['log']
            assert 'filename' not in record or (root / record['filename']).is_file()
    named = {r['filename'] for r in raw['sample_data'] + raw['map']}
    on_disk = {str(f.relative_to(root)) for f in root.glob('[sm]*/**/*.*')}
    assert named == on_disk
    assert sorted(t for m in raw['map'] for t in m['log_tokens']) == sorted(known['log'])


@pytest.mark.parametrize('table', ['sample', 'sample_data', 'sample_annotation'])
def test_chains_run_forward_in_time(nusc, table):
    records = getattr(nusc, table)
    for record in records:
        if not record['next']:
            continue
        after = nusc.get(table, record['next'])
        assert after['prev'] == record['token']
        if table == 'sample_annotation':
            assert after['instance_token'] == record['instance_token']
            assert after['size'] == record['size']
            record, after = (nusc.get('sample', r['sample_token']) for r in (record, after))
        assert after['timestamp'] > record['timestamp']
    heads = sum(not r['prev'] for r in records)
    channels = 7
    assert heads == {'sample': 2, 'sample_data': 2 * channels, 'sample_annotation': len(nusc.instance)}[table]


def test_instances_know_their_annotations(nusc):
    for instance in nusc.instance:
        token, count = instance['first_annotation_token'], 0
        while token:
            last, count = token, count + 1
            token = nusc.get('sample_annotation', token)['next']
        assert (last, count) == (instance['last_annotation_token'], instance['nbr_annotations'])


def test_point_counts_are_those_of_the_devkit(nusc):
    total = 0
    for sample in nusc.sample:
        path, boxes, _ = nusc.get_sample_data(sample['data']['LIDAR_TOP'])
        points = LidarPointCloud.from_file(path).points[:3].astype(np.float64)
        for box in boxes:
            count = nusc.get('sample_annotation', box.token)['num_lidar_pts']
            assert points_in_box(box, points).sum() == count
            total += count
    assert total > 1000


def test_every_class_is_there_and_has_fitting_attributes(nusc):
    attributes = {a['token']: a['name'] for a in nusc.attribute}
    for scene in nusc.scene:
        seen = set()
        sample = nusc.get('sample', scene['first_sample_token'])
        for token in sample['anns']:
            annotation = nusc.get('sample_annotation', token)
            name = category_to_detection_name(annotation['category_name'])
            allowed = detection_name_to_rel_attributes(name)
            names = [attributes[t] for t in annotation['attribute_tokens']]
            assert len(names) == bool(allowed) and set(names) <= set(allowed)
            if annotation['num_lidar_pts']:
                seen.add(name)
            speed = np.linalg.norm(nusc.box_velocity(token)[:2])
            if names and not np.isnan(speed) and names[0].split('.')[0] in ('vehicle', 'pedestrian'):
                assert (names[0].split('.')[1] == 'moving') == (speed > 0.3), (name, names, speed)
        assert seen == set(CLASSES)


def test_point_files(nusc):
    for record in nusc.sample_data:
        if record['channel'] != 'LIDAR_TOP':
            continue
        points = np.fromfile(nusc.get_sample_data_path(record['token']), np.float32).reshape(-1, 5)
        assert 4000 < len(points) < 20480
        distance = np.linalg.norm(points[:, :3], axis=1)
        assert distance.min() > 1 and distance.max() < 70.5
        assert points[:, 3].min() >= 0 and points[:, 3].max() <= 255
        assert set(np.unique(points[:, 4])) <= set(range(32))
        elevation = np.rad2deg(np.arcsin(points[:, 2] / distance))
        assert np.allclose(elevation, -30.67 + points[:, 4] * 41.34 / 31, atol=1e-3)
    sweeps = [r for r in nusc.sample_data if not r['is_key_frame']]
    assert sweeps and all(r['filename'].startswith('sweeps/LIDAR_TOP/') for r in sweeps)


def test_static_objects_stay_put_between_sweeps(nusc):
    """Points of consecutive sweeps agree once the motion of the vehicle is taken out."""
    sample = nusc.get('sample', nusc.scene[0]['last_sample_token'])
    key = sample['data']['LIDAR_TOP']
    earlier = nusc.get('sample_data', key)['prev']
    clouds = []
    for token in (key, earlier):
        record = nusc.get('sample_data', token)
        cloud = LidarPointCloud.from_file(nusc.get_sample_data_path(token))
        for pose in (
            nusc.get('calibrated_sensor', record['calibrated_sensor_token']),
            nusc.get('ego_pose', record['ego_pose_token']),
        ):
            cloud.rotate(Quaternion(pose['rotation']).rotation_matrix)
            cloud.translate(np.array(pose['translation']))
        clouds.append(cloud.points[:3].astype(np.float64))
    compared = 0
    for token in sample['anns']:
        annotation = nusc.get('sample_annotation', token)
        if np.linalg.norm(nusc.box_velocity(token)) > 0.01 or annotation['num_lidar_pts'] < 40:
            continue
        box = nusc.get_box(token)
        here, before = (points_in_box(box, cloud).sum() for cloud in clouds)
        assert before > here / 3
        compared += 1
    assert compared >= 3


def test_ego_drives_on_the_map(nusc):
    for record in nusc.sample_data:
        scene = nusc.get('scene', nusc.get('sample', record['sample_token'])['scene_token'])
        mask = nusc.get('map', nusc.get('log', scene['log_token'])['map_token'])['mask']
        x, y = nusc.get('ego_pose', record['ego_pose_token'])['translation'][:2]
        assert mask.is_on_mask(x, y).all()
