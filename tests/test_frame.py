"""A recorded frame is read from a file or from a folder, and what is missing is named."""

import os
import pickle

import numpy as np
import pytest

from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import read_frame

INTRINSIC = [[1200.0, 0.0, 800.0], [0.0, 1200.0, 450.0], [0.0, 0.0, 1.0]]


def write(folder, change=lambda info: None):
    """A folder of a frame with two cameras; ``change`` spoils the info before it is written."""
    points = np.arange(50, dtype=np.float32).reshape(10, 5)
    (folder / 'a.pcd.bin').write_bytes(points.tobytes())
    images = {}
    for i, name in enumerate(('CAM_BACK', 'CAM_FRONT')):
        (folder / f'{name}.jpg').write_bytes(b'image')
        lidar2cam = np.eye(4)
        lidar2cam[:3, 3] = i + 1
        images[name] = {
            'img_path': f'samples/{name}/{name}.jpg',
            'cam2img': INTRINSIC,
            'lidar2cam': lidar2cam.tolist(),
            'timestamp': np.float64(3.0),
        }
    info = {'images': images, 'lidar_points': {'lidar_path': 'samples/a.pcd.bin'}, 'labels': np.arange(3)}
    other = {'images': {}, 'lidar_points': {'lidar_path': 'b.pcd.bin'}}
    content = {'metainfo': {}, 'data_list': [other, info]}
    change(content)
    (folder / 'infos.pkl').write_bytes(pickle.dumps(content))
    return str(folder)


def test_a_folder_has_points_and_cameras_in_the_order_of_the_info(tmp_path):
    frame = read_frame(write(tmp_path))
    assert frame.points.shape == (10, 5) and not frame.points[:, 4].any()
    assert frame.points[1, :4].tolist() == [5, 6, 7, 8]
    assert [c.name for c in frame.cameras] == ['CAM_BACK', 'CAM_FRONT']
    for i, camera in enumerate(frame.cameras):
        assert camera.image.read_bytes() == b'image'
        np.testing.assert_array_equal(camera.intrinsic, INTRINSIC)
        np.testing.assert_array_equal(camera.from_lidar[:, 3], [i + 1, i + 1, i + 1, 1])


def test_a_file_is_a_frame_of_points_alone(tmp_path):
    write(tmp_path)
    frame = read_frame(str(tmp_path / 'a.pcd.bin'))
    assert len(frame.points) == 10 and frame.cameras == ()


class Harmful:
    """Its pickle runs a command when it is read."""

    def __reduce__(self):
        return os.system, ('echo harm',)


def without(*path):
    """A change that takes an entry of the second frame away."""

    def change(content):
        node = content['data_list'][1]
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return change


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (without('images'), 'no info file with images for .a.pcd.bin.'),
        (without('images', 'CAM_BACK', 'lidar2cam'), 'CAM_BACK has no cam2img or no lidar2cam'),
        (without('lidar_points'), 'no info file'),
        (lambda c: c['data_list'].pop(), 'no info file'),
        (lambda c: c.pop('data_list'), 'no info file'),
        (lambda c: c.update(more=Harmful()), 'is not plain data'),
        (lambda c: c['data_list'][1]['images']['CAM_BACK'].update(img_path='x.jpg'), "'x.jpg', is not there"),
    ],
)
def test_an_info_that_cannot_work_is_named(tmp_path, capfd, change, words):
    with pytest.raises(Q3DError, match=words):
        read_frame(write(tmp_path, change))
    assert 'harm' not in capfd.readouterr().out


@pytest.mark.parametrize(
    ('spoil', 'words'),
    [
        (lambda f: (f / 'a.pcd.bin').unlink(), r'has 0 files \*.bin'),
        (lambda f: (f / 'b.bin').write_bytes(b''), r'has 2 files \*.bin'),
        (lambda f: (f / 'infos.pkl').unlink(), r'has 0 files \*.pkl'),
        (lambda f: (f / 'infos.pkl').write_bytes(b'cut'), 'no info file'),
        (lambda f: (f / 'CAM_FRONT.jpg').unlink(), 'the image of CAM_FRONT'),
        (lambda f: (f / 'a.pcd.bin').write_bytes(b'123'), 'has 3 bytes'),
    ],
)
def test_a_folder_that_lacks_something_is_named(tmp_path, spoil, words):
    folder = write(tmp_path)
    spoil(tmp_path)
    with pytest.raises(Q3DError, match=words):
        read_frame(folder)
