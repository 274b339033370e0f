"""A folder of a recorded frame, made of a generated one, and slow references for what detectors get of it."""

import pickle

import numpy as np
from PIL import Image

from q3d_plugin.benchmark.frame import generated_frame
from q3d_plugin.frame import read_frame

RESIZE, SIZE = 0.48, (256, 704)
"""How BEVFusion scales the images of nuScenes in testing, and the height and width that it cuts them to."""


def recorded(folder, count=3000):
    """A frame with six cameras, read from a folder as a recorded one is."""
    frame = generated_frame(folder, count)
    images = {
        c.name: {
            'img_path': c.image.name,
            'cam2img': c.intrinsic.tolist(),
            'lidar2cam': c.from_lidar.tolist(),
        }
        for c in frame.cameras
    }
    info = {'images': images, 'lidar_points': {'lidar_path': frame.lidar.name}}
    (folder / 'infos.pkl').write_bytes(pickle.dumps({'data_list': [info]}))
    return read_frame(str(folder))


def cut_image(camera):
    """The image (height, width, 3) as BEVFusion cuts it: scaled, then the lower middle."""
    with Image.open(camera.image) as image:
        width, height = (int(n * RESIZE) for n in image.size)
        scaled = image.resize((width, height))
        left, top = (width - SIZE[1]) // 2, height - SIZE[0]
        return np.asarray(scaled.crop((left, top, left + SIZE[1], top + SIZE[0])))


def pixels_of(camera, points):
    """Where points (N, 3) of the LiDAR are in the cut image: (N, 2), and their depths."""
    local = points @ camera.from_lidar[:3, :3].T + camera.from_lidar[:3, 3]
    flat = local @ camera.intrinsic.T
    with Image.open(camera.image) as image:
        width, height = (int(n * RESIZE) for n in image.size)
    corner = [(width - SIZE[1]) // 2, height - SIZE[0]]
    return flat[:, :2] / flat[:, 2:] * RESIZE - corner, local[:, 2]


def by_matrices(points, lidar2img, img_aug):
    """The same by the matrices that a view transform gets."""
    there = np.c_[points, np.ones(len(points))] @ np.asarray(lidar2img, float).T
    there[:, :2] /= there[:, 2:3]
    there[:, 2] = 1
    return (there[:, :3] @ np.asarray(img_aug, float)[:3, :3].T + np.asarray(img_aug, float)[:3, 3])[:, :2]
