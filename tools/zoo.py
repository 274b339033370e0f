"""Every detector config of both frameworks: does it build quantized, how much is, and is it float when off.

    python tools/zoo.py --mmdet3d [CONFIG_DIR] --openpcdet [ROOT] [--only PATTERN] [--out zoo.json] [--resume]

Each config is built in float and once more with the Quant types put in mechanically. Both get the same random
weights (BatchNorm statistics included, so that folding is really tested). Where the float model runs on the
CPU on a made-up frame, every layer of the quantized model with all quantizers off is compared with the float
layer (with its BatchNorm, where that was folded). With --int8 the model is then calibrated on the frame and
runs in INT8. Each config has a process of its own, with a limit of time and memory.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == '__main__':
    # Python puts this folder first on the path, where its scripts would shadow modules of the standard
    # library (profile.py, for example).
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or '.') != HERE]

import argparse  # noqa: E402
import collections  # noqa: E402
import contextlib  # noqa: E402
import copy  # noqa: E402
import dataclasses  # noqa: E402
import fnmatch  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import multiprocessing  # noqa: E402
import resource  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Dict, List, Optional, Tuple  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: E402

from q3d_plugin import checkpoints, lifecycle  # noqa: E402
from q3d_plugin.coverage import coverage  # noqa: E402
from q3d_plugin.errors import Q3DError  # noqa: E402
from q3d_plugin.files import check_writable, write_text  # noqa: E402
from q3d_plugin.layers import QuantUnit  # noqa: E402
from q3d_plugin.recipe import Recipe  # noqa: E402

OUT = 'work_dirs/zoo/zoo.json'
TOLERANCE = 1e-4
DOUBLE_TOLERANCE = 1e-9
OURS = 'OURS'
RECIPE = {'weight': {'calibrator': 'max'}, 'activation': {'calibrator': 'max'}}
POINTS = 32_000
IMAGE = (256, 512)
VIEWS = 5
SAMPLE = 1 << 16


@dataclasses.dataclass
class Row:
    """What came out for one config.

    Attributes:
        framework: ``'mmdet3d'`` or ``'openpcdet'``.
        config: Its path below the folder of configs.
        float_build: Empty where the float model was built, else the framework's reason.
        quant_build: Empty where the quantized model was built; None where there was no float model.
        layers: Convolutions, linear layers and attention projections.
        quantized: How many of these are quantized.
        elements: Elements of all their weights.
        quantized_elements: Elements of the weights of the quantized ones.
        left: Reason -> type -> how many layers are not quantized.
        forward: Empty where the float forward ran to its end, else where it stopped and why; None where it
            was not tried.
        twin: The config whose forward this one's is, because model and frame are the same.
        compared: How many layers the forward reached, of ``comparable`` ones.
        comparable: Layers whose outputs can be compared.
        difference: Largest difference, quantizers off against float, of any layer's output, relative to the
            largest magnitude of that output; None where nothing was compared.
        worst: The layer with that difference.
        double: The same difference in double precision, measured where that in single precision is above the
            tolerance and every layer runs in double: rounding alone vanishes there, a mistake does not.
        jitter: Where it does not, the difference of the float model from itself with the last bit of its
            weights changed at random, which is what folding does to them.
        int8: Relative L2 error of the INT8 outputs: median over the layers.
        ours: The traceback of a failure of this plugin.
        seconds: Time it took.
        memory: Peak resident memory, GiB.
    """

    framework: str
    config: str
    float_build: str = 'not tried'
    quant_build: Optional[str] = None
    layers: int = 0
    quantized: int = 0
    elements: int = 0
    quantized_elements: int = 0
    left: Dict[str, Dict[str, int]] = dataclasses.field(default_factory=dict)
    forward: Optional[str] = None
    twin: str = ''
    compared: int = 0
    comparable: int = 0
    difference: Optional[float] = None
    worst: str = ''
    double: Optional[float] = None
    jitter: Optional[float] = None
    int8: Optional[float] = None
    ours: str = ''
    seconds: float = 0.0
    memory: float = 0.0

    @property
    def same(self) -> bool:
        """Whether off equals float within the tolerance."""
        return self.difference is not None and self.difference < TOLERANCE

    @property
    def rounding(self) -> bool:
        """Whether it does not, but by no more than rounding makes of the float model itself."""
        if self.same or self.difference is None:
            return False
        if self.double is not None:
            return self.double < DOUBLE_TOLERANCE
        return self.jitter is not None and self.difference < 3 * self.jitter


def first_line(error: BaseException) -> str:
    """The first line of an exception with its type, without the paths of this machine."""
    text = ' '.join((str(error).strip().splitlines() or [''])[0].split())
    text = text.replace(os.path.realpath(sys.prefix), '<env>').replace(sys.prefix, '<env>')
    return f'{type(error).__name__}: {text}'[:200].rstrip(': ')


# What the frameworks differ in


class MMDet3D:
    """MMDetection3D's configs.

    Args:
        folder: Of the configs; those of the installed wheel where None.
    """

    name = 'mmdet3d'

    def __init__(self, folder: Optional[str] = None) -> None:
        try:
            import mmdet3d
        except ImportError as error:
            raise Q3DError(f'--mmdet3d: MMDetection3D does not import ({error})') from error
        from mmdet3d.utils import register_all_modules

        import q3d_plugin.mmdet3d  # noqa: F401  (registers the Quant types)

        register_all_modules(init_default_scope=True)
        self.folder = Path(folder or Path(mmdet3d.__file__).parent / '.mim' / 'configs')
        if not self.folder.is_dir():
            raise Q3DError(f'--mmdet3d: {str(self.folder)!r} is not a folder')

    def configs(self) -> List[str]:
        """All configs but those that are only inherited from."""
        found = (p.relative_to(self.folder) for p in self.folder.rglob('*.py'))
        return sorted(str(p) for p in found if not any(part.startswith('_') for part in p.parts))

    def read(self, config: str):
        from mmengine.config import Config

        return Config.fromfile(self.folder / config)

    def key(self, cfg) -> str:
        """What two configs have in common whose models do the same on the made-up frame."""
        parts = (cfg.model.to_dict(), cfg.get('test_pipeline'), cfg.get('point_cloud_range'))
        # Of one stage, test_cfg says how boxes are suppressed in the end; else which go into the second one.
        other = ('train_cfg', 'init_cfg', 'loss') + (() if 'roi_head' in cfg.model else ('test_cfg',))
        return json.dumps(_without(parts, other), sort_keys=True, default=str)

    def build(self, cfg, quantized: bool) -> nn.Module:
        from mmdet3d.registry import MODELS

        model = copy.deepcopy(cfg.model)
        if quantized:
            put_quant_types(model)
        return MODELS.build(model)

    def load(self, model: nn.Module, state: Mapping) -> None:
        from mmengine.runner.checkpoint import load_state_dict

        checkpoints.check_state_dict(model, state)
        load_state_dict(model, state, strict=True)

    def frame(self, cfg, model: nn.Module) -> Any:
        from mmdet3d.structures import Det3DDataSample, get_box_type
        from mmengine.registry import init_default_scope

        init_default_scope('mmdet3d')
        steps = list(_steps(cfg.get('test_pipeline') or cfg.test_dataloader.dataset.pipeline))
        packed = {k for s in steps if s['type'] == 'Pack3DDetInputs' for k in s['keys']}
        loader = next((s for s in steps if s['type'] == 'LoadPointsFromFile'), {})
        inputs, views = {}, 0
        if 'points' in packed:
            inputs['points'] = [torch.from_numpy(self._points(cfg, model, loader, steps))]
        if 'img' in packed:
            views = VIEWS if any('MultiView' in s['type'] for s in steps) else 0
            generator = torch.Generator().manual_seed(0)
            shape = (views, 3, *IMAGE) if views else (3, *IMAGE)
            inputs['img'] = [torch.randint(0, 256, shape, generator=generator).float()]
        coordinates = next((s['coord_type'] for s in steps if 'coord_type' in s), None)
        coordinates = coordinates or ('CAMERA' if not hasattr(model, 'neck_3d') else 'LIDAR')
        sample = Det3DDataSample(metainfo=_metainfo(*get_box_type(coordinates.title()), views))
        data = model.data_preprocessor({'inputs': inputs, 'data_samples': [sample]}, False)
        return data['inputs'], data['data_samples']

    def _points(self, cfg, model, loader, steps) -> np.ndarray:
        layer = getattr(model.data_preprocessor, 'voxel_layer', None)
        area = getattr(layer, 'point_cloud_range', None) or cfg.get('point_cloud_range')
        indoor = loader.get('coord_type') == 'DEPTH'
        area = area or ([-3, -3, -0.5, 3, 3, 2.5] if indoor else [0, -40, -3, 70, 40, 1])
        dims = loader.get('use_dim', 4)
        sweeps = next((s for s in steps if s['type'] == 'LoadPointsFromMultiSweeps'), None)
        if sweeps is not None:
            dims = sweeps.get('use_dim', [0, 1, 2, 4])
        channels = (dims if isinstance(dims, int) else len(dims)) + bool(loader.get('shift_height'))
        backbone = getattr(model, 'backbone', None)
        if 'PointNet' in type(backbone).__name__ or 'DGCNN' in type(backbone).__name__:
            channels = getattr(backbone, 'in_channels', channels)
        # The first six numbers of a cylinder are radius, angle and height.
        if 'Cylinder' in type(model).__name__:
            area = [-30, -30, -4, 30, 30, 2]
        return made_up_points([float(v) for v in area], max(channels, 3), 4096 if indoor else POINTS)

    def run(self, model: nn.Module, frame: Any) -> None:
        inputs, samples = frame
        # A block of a room is voted on by sliding windows otherwise.
        mode = 'tensor' if type(model).__name__ == 'EncoderDecoder3D' else 'predict'
        model(copy.deepcopy(inputs), copy.deepcopy(samples), mode=mode)


def _without(node: Any, prefixes: Tuple[str, ...]) -> Any:
    """A config without the keys that begin with one of ``prefixes``."""
    if isinstance(node, Mapping):
        return {k: _without(v, prefixes) for k, v in node.items() if not str(k).startswith(prefixes)}
    return [_without(v, prefixes) for v in node] if isinstance(node, (list, tuple)) else node


def _steps(pipeline) -> Iterator[Dict]:
    for step in pipeline:
        yield step
        yield from _steps(step.get('transforms', ()))


def _metainfo(box_type, box_mode, views: int) -> Dict[str, Any]:
    """What the pipelines write about a frame, for a camera that looks ahead, or several that do."""
    height, width = IMAGE
    cam2img = np.array([[width, 0, width / 2, 0], [0, width, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    lidar2cam = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    depth2cam = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])
    lidar2img = (cam2img @ lidar2cam).astype(np.float32)
    made = {
        'box_type_3d': box_type,
        'box_mode_3d': box_mode,
        'cam2img': cam2img.astype(np.float32).tolist(),
        'ori_cam2img': cam2img.astype(np.float32).tolist(),
        'lidar2cam': lidar2cam.astype(np.float32),
        'lidar2img': lidar2img,
        'ori_lidar2img': lidar2img,
        'depth2img': (cam2img[:3, :3] @ depth2cam).astype(np.float32),
        'trans_mat': np.array([[0.25, 0, 0], [0, 0.25, 0], [0, 0, 1]], np.float32),
        'affine_aug': False,
        'img_shape': IMAGE,
        'ori_shape': IMAGE,
        'pad_shape': IMAGE,
        'input_shape': IMAGE,
        'batch_input_shape': IMAGE,
        'scale_factor': np.ones(4, np.float32),
        'flip': False,
        'sample_idx': 0,
        'lidar_path': 'frame.bin',
    }
    if views:
        for key in ('lidar2cam', 'lidar2img', 'ori_cam2img', 'ori_lidar2img', 'scale_factor', 'flip'):
            made[key] = [made[key]] * views
        made.update(num_views=views, num_ref_frames=0)
    return made


def put_quant_types(node: Any, scope: str = '') -> int:
    """Puts Quant before every type of a config that has a quantized one, in place.

    Args:
        node: A model's config, or a part of one.
        scope: The ``_scope_`` of the dictionaries around it.

    Returns:
        int: How many types were changed.
    """
    from q3d_plugin.mmdet3d.parts import PARTS, quant_name

    known = {p.base: quant_name(p.base) for p in PARTS}
    changed = 0
    if isinstance(node, dict):
        scope = node.get('_scope_', scope)
        kind = node.get('type')
        name = known.get(kind) or (known.get(f'{scope}.{kind}') if scope else None)
        if isinstance(kind, str) and name:
            # Inside of another scope names are looked up in that framework's registry.
            node['type'] = f'mmdet3d.{name}' if scope else name
            changed += 1
    if isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            changed += put_quant_types(child, scope)
    return changed


class OpenPCDet:
    """OpenPCDet's configs.

    Args:
        root: Its checkout; where None, as :func:`q3d_plugin.openpcdet.register` finds it.
    """

    name = 'openpcdet'

    def __init__(self, root: Optional[str] = None) -> None:
        from q3d_plugin import openpcdet

        package = Path(openpcdet.register(root).__file__).resolve().parent
        self.tools = package.parent / 'tools'
        if not (self.tools / 'cfgs').is_dir():
            raise Q3DError(f'--openpcdet: {str(self.tools)!r} has no cfgs: name a checkout of OpenPCDet')

    def configs(self) -> List[str]:
        """All configs of models."""
        return sorted(
            str(p.relative_to(self.tools / 'cfgs')) for p in self.tools.glob('cfgs/*_models/*.yaml')
        )

    def read(self, config: str):
        from easydict import EasyDict
        from pcdet.config import cfg_from_yaml_file

        with contextlib.chdir(self.tools) if hasattr(contextlib, 'chdir') else _chdir(self.tools):
            return cfg_from_yaml_file(f'cfgs/{config}', EasyDict())

    def key(self, cfg) -> str:
        """What two configs have in common whose models do the same on the made-up frame."""
        data = cfg.DATA_CONFIG
        parts = (cfg.MODEL, data.POINT_CLOUD_RANGE, data.POINT_FEATURE_ENCODING, data.DATA_PROCESSOR)
        parts = (parts, cfg.CLASS_NAMES)
        return json.dumps(_without(parts, ('LOSS', 'TARGET_CONFIG')), sort_keys=True, default=str)

    def build(self, cfg, quantized: bool) -> nn.Module:
        from easydict import EasyDict
        from pcdet.datasets import DatasetTemplate
        from pcdet.models import build_network
        from pcdet.models.model_utils import mppnet_utils

        from q3d_plugin.openpcdet.registries import REGISTRIES, registry_of

        cfg = copy.deepcopy(cfg)
        if quantized:
            for section in REGISTRIES:
                part = cfg.MODEL if section == 'NAME' else cfg.MODEL.get(section)
                if part is not None and f'Quant{part.NAME}' in registry_of(section):
                    part.NAME = f'Quant{part.NAME}'
            cfg.MODEL.QUANT = EasyDict({k.upper(): _upper(v) for k, v in RECIPE.items()})
        # The weights are random here: a file of pretrained ones, which BEVFusion names, is not needed.
        cfg.MODEL.get('IMAGE_BACKBONE', {}).pop('INIT_CFG', None)
        # Images are made up as tensors, after what would read and scale them.
        steps = cfg.DATA_CONFIG.DATA_PROCESSOR
        cfg.DATA_CONFIG.DATA_PROCESSOR = [s for s in steps if not s.NAME.startswith('image_')]
        # MPPNet counts the layers that it ever made, so that a second one in a process is another model.
        mppnet_utils.TransformerEncoderLayer.count = 0
        data = DatasetTemplate(cfg.DATA_CONFIG, cfg.CLASS_NAMES, training=False, root_path=Path('/nowhere'))
        with contextlib.chdir(self.tools) if hasattr(contextlib, 'chdir') else _chdir(self.tools):
            return build_network(model_cfg=cfg.MODEL, num_class=len(cfg.CLASS_NAMES), dataset=data)

    def load(self, model: nn.Module, state: Mapping) -> None:
        model._load_state_dict(state, strict=False)

    def frame(self, cfg, model: nn.Module) -> Any:
        from pcdet.models import load_data_to_gpu

        features = cfg.DATA_CONFIG.POINT_FEATURE_ENCODING.src_feature_list
        points = made_up_points([float(v) for v in cfg.DATA_CONFIG.POINT_CLOUD_RANGE], len(features), POINTS)
        np.random.seed(0)
        item = model.dataset.prepare_data({'points': points, 'frame_id': 'frame'})
        batch = model.dataset.collate_batch([item])
        load_data_to_gpu(batch)
        if 'IMAGE_BACKBONE' in cfg.MODEL:
            batch.update(_cameras(cfg.MODEL.VTRANSFORM.IMAGE_SIZE))
        return batch

    def run(self, model: nn.Module, frame: Any) -> None:
        # A quantized detector calibrates itself on its data set at its first forward, where it is not ready.
        model._q3d_ready = True
        model(copy.deepcopy(frame))


def _cameras(size: List[int], count: int = 6) -> Dict[str, Tensor]:
    """Images and matrices of cameras that look around, as OpenPCDet's nuScenes data set gives them."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    intrinsics = torch.tensor(
        [[width / 2, 0, width / 2, 0], [0, width / 2, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
    )
    to_image = []
    for angle in torch.arange(count) * (2 * math.pi / count):
        cos, sin = torch.cos(angle).item(), torch.sin(angle).item()
        to_image.append([[sin, -cos, 0, 0], [0, 0, -1, 0], [cos, sin, 0, 0], [0, 0, 0, 1.0]])
    lidar2camera = torch.tensor(to_image)[None]
    return {
        'camera_imgs': torch.randn(1, count, 3, height, width, generator=generator),
        'camera_intrinsics': intrinsics.expand(1, count, 4, 4),
        'lidar2camera': lidar2camera,
        'camera2lidar': torch.linalg.inv(lidar2camera),
        'lidar2image': intrinsics @ lidar2camera,
        'img_aug_matrix': torch.eye(4).expand(1, count, 4, 4),
        'lidar_aug_matrix': torch.eye(4)[None],
    }


def _upper(value: Any) -> Any:
    return {k.upper(): _upper(v) for k, v in value.items()} if isinstance(value, dict) else value


@contextlib.contextmanager
def _chdir(path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


# One config


def made_up_points(area: List[float], channels: int, count: int) -> np.ndarray:
    """Points of a ground and of clusters on it.

    Args:
        area: Lower and upper bounds in x, y, z, metres.
        channels: Numbers per point; all beyond the third are between 0 and 1.
        count: Number of points.

    Returns:
        np.ndarray: (count, channels) float32, inside the area.
    """
    rng = np.random.default_rng(0)
    low, high = np.array(area[:3]), np.array(area[3:6])
    size = high - low
    points = rng.uniform(0, 1, (count, channels))
    centres = rng.uniform(0.1, 0.9, (32, 3))
    chosen = rng.integers(0, 32, count)
    clustered = rng.random(count) < 0.7
    spread = centres[chosen] + rng.normal(0, 0.01, (count, 3)) * np.array([1, 1, 5])
    points[:, :3] = np.where(clustered[:, None], spread, points[:, :3]).clip(0.001, 0.999) * size + low
    return points.astype(np.float32)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Gives every BatchNorm statistics and parameters of its own: the defaults fold to almost nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)


def own_weights(module: nn.Module) -> List[Tensor]:
    """The weights of a layer that are matrices or kernels."""
    if isinstance(module, QuantUnit):
        weight = getattr(module, 'weight', None)
        return [] if weight is None else [weight]
    return [p for n, p in module._parameters.items() if p is not None and 'weight' in n and p.dim() > 1]


def share(model: nn.Module, row: Row) -> None:
    """Counts what is quantized, from the coverage table of ``model``."""
    left = collections.defaultdict(collections.Counter)
    for line in coverage(model):
        module = model.get_submodule(line.name)
        weights = own_weights(module)
        if not weights or isinstance(module, nn.Embedding):
            continue
        elements = sum(w.numel() for w in weights)
        row.layers, row.elements = row.layers + 1, row.elements + elements
        if line.quantized:
            row.quantized, row.quantized_elements = row.quantized + 1, row.quantized_elements + elements
        else:
            left[line.note][line.kind] += 1
    row.left = {reason: dict(kinds) for reason, kinds in left.items()}


def compared_at(model: nn.Module) -> Dict[str, str]:
    """For each layer of a quantized model the name at which the float model has the same tensor: the layer's,
    that of the BatchNorm that was folded into it (whose place an identity holds), or that of the attention
    that it is a projection of (the float one does not call its projections)."""
    folded = {}
    for name, module in model.named_modules():
        for fold in getattr(module, '_q3d_folds', ()):
            dot = f'{name}.' if name else ''
            folded[dot + fold.layer] = dot + fold.norm
    places = {}
    for name, module in model.named_modules():
        holder = name.rpartition('.')[0]
        if isinstance(model.get_submodule(holder), nn.MultiheadAttention):
            places[name] = holder
        elif own_weights(module):
            places[name] = folded.get(name, name)
    return places


def comparable(model: nn.Module) -> List[str]:
    """Names at which a quantized model has the same tensors as the float one."""
    return list(dict.fromkeys(compared_at(model).values()))


def settle(model: nn.Module) -> List:
    """Lets every BatchNorm take the statistics of the first tensor that it sees, but for a tenth, so that
    signals neither fade nor grow with depth.

    Returns:
        list: Handles, whose ``remove()`` ends it.
    """
    generator = torch.Generator().manual_seed(1)
    seen = set()

    def take(norm: _BatchNorm, args: Tuple) -> None:
        x = args[0]
        if norm in seen or not norm.track_running_stats or x.numel() < 2 * norm.num_features:
            return
        seen.add(norm)
        rows = x.detach().transpose(0, 1).reshape(x.shape[1], -1)
        var = rows.var(1).clamp(min=1e-4)
        near = torch.empty(2, len(var)).uniform_(-0.1, 0.1, generator=generator)
        norm.running_mean.copy_(rows.mean(1) + near[0] * var.sqrt())
        norm.running_var.copy_(var * (1 + near[1]))

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [m.register_forward_pre_hook(take) for m in norms]


@torch.no_grad()
def spoil_idle(model: nn.Module, ran: Mapping) -> None:
    """Makes the weights NaN of quantized layers whose forward was not called.

    Where code reads such a weight past the layer's forward, which no quantizer would see, the outputs show
    it.

    Args:
        model: A quantized model with the weights loaded.
        ran: Names, as of :func:`comparable`, of what was called in the float model.
    """
    for name, place in compared_at(model).items():
        if place not in ran:
            for weight in own_weights(model.get_submodule(name)):
                weight.fill_(math.nan)


Sampled = Tuple[Tuple[int, ...], Tensor]


def sample(output: Any) -> List[Sampled]:
    """Shape and evenly spaced elements of every floating tensor in what a module returned."""
    if isinstance(output, Tensor):
        if not output.is_floating_point():
            return []
        flat = output.detach().reshape(-1)
        return [(tuple(output.shape), flat[:: max(1, flat.numel() // SAMPLE)].clone())]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [s for item in output for s in sample(item)]
    return sample(output.features) if isinstance(getattr(output, 'features', None), Tensor) else []


def record(framework, model: nn.Module, frame: Any, names: List[str]) -> Tuple[Dict, str]:
    """Runs the model on the frame, as far as it comes.

    Returns:
        tuple: For each name what its module gave, call by call; and why it stopped, or ''.
    """
    seen = collections.defaultdict(list)

    def hook(name: str) -> Callable:
        return lambda module, args, output: seen[name].append(sample(output))

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    stopped = ''
    try:
        with torch.no_grad():
            framework.run(model, frame)
    except Exception as error:
        # What else a quantized model raises, the float one has to raise, too.
        if isinstance(error, Q3DError):
            raise
        stopped = first_line(error)
    finally:
        for handle in handles:
            handle.remove()
    return dict(seen), stopped


def _pairs(expected: Dict, got: Dict) -> Iterator[Tuple[str, Optional[Tensor], Optional[Tensor]]]:
    for name, calls in expected.items():
        flat = [s for call in calls for s in call]
        mine = [s for call in got.get(name, ()) for s in call]
        for a, b in zip(flat, mine):
            yield (name, a[1], b[1]) if a[0] == b[0] else (name, None, None)
        if len(flat) != len(mine):
            yield name, None, None


def in_double(value: Any) -> Any:
    """A frame with every floating tensor in double precision."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: in_double(v) for k, v in value.items()}
    return type(value)(in_double(v) for v in value) if type(value) in (list, tuple) else value


def compare_in_double(framework, reference, model, frame, names: List[str], ran: set) -> Optional[float]:
    """:func:`compare` of two models in double precision; None where they do not run as far as in single.

    BatchNorm is folded anew, without rounding to single precision.
    """
    both = []
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        framework.load(model.double(), copy.deepcopy(reference.double().state_dict()))
        lifecycle.set_enabled(model, False)
        for net in (reference, model):
            both.append(record(framework, net, in_double(frame), names)[0])
    finally:
        torch.set_default_dtype(default)
        reference.float()
        model.float()
    return compare(*both)[0] if all(set(seen) == ran for seen in both) else None


@torch.no_grad()
def jitter(model: nn.Module) -> None:
    """Changes the weights of ``model`` in their last bit, at random."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.mul_(1 + 2**-23 * (2 * torch.rand(parameter.shape, generator=generator) - 1))


def compare(expected: Dict, got: Dict) -> Tuple[Optional[float], str]:
    """The largest relative difference of any tensor and where it is; infinite where one is missing."""
    worst, where = None, ''
    for name, a, b in _pairs(expected, got):
        if a is None:
            return math.inf, name
        if not a.numel():
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return math.inf, name
        if not finite.any():
            continue
        scale, difference = a[finite].abs().max().item(), (a - b)[finite].abs().max().item()
        relative = difference / scale if scale else (0.0 if difference == 0 else math.inf)
        if worst is None or relative > worst:
            worst, where = relative, name
    return worst, where


def int8_error(expected: Dict, got: Dict) -> Optional[float]:
    """Median over all tensors of the relative L2 error; tensors of other shapes are left out."""
    errors = []
    for _, a, b in _pairs(expected, got):
        if a is not None and a.numel() and a.isfinite().all() and a.norm() > 0:
            errors.append(((a - b).norm() / a.norm()).item())
    return float(np.median(errors)) if errors else None


def examine(framework, config: str, forward: bool, int8: bool = False) -> Row:
    """Everything about one config. Exceptions of the plugin end up in the row, as those of the framework."""
    row, start = Row(framework.name, config), time.time()
    try:
        _examine(framework, config, forward, int8, row)
    except Exception:
        row.ours = traceback.format_exc()
    row.seconds = time.time() - start
    row.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row


def _examine(framework, config: str, forward: bool, int8: bool, row: Row) -> None:
    torch.manual_seed(0)
    try:
        cfg = framework.read(config)
        reference = framework.build(cfg, quantized=False)
        # Not in one line: ImVoteNet's train() returns nothing.
        reference.eval()
    except Exception as error:
        row.float_build = first_line(error)
        return
    row.float_build = ''
    randomize(reference)
    row.quant_build = 'failed'
    model = framework.build(cfg, quantized=True)
    model.eval()
    lifecycle.configure(model, Recipe.from_dict(RECIPE))
    share(model, row)
    names = comparable(model)
    row.comparable = len(names)
    expected, frame = {}, None
    if forward:
        try:
            frame = framework.frame(cfg, reference)
        except Exception as error:
            row.forward = f'no frame: {first_line(error)}'
        else:
            handles = settle(reference)
            expected, row.forward = record(framework, reference, frame, names)
            for handle in handles:
                handle.remove()
    row.compared = len(expected)
    # A copy, with the layout versions in its _metadata, which spconv's loaders ask for.
    state = copy.deepcopy(reference.state_dict())
    framework.load(model, copy.deepcopy(state))
    lifecycle.configure(model, Recipe.from_dict(RECIPE))
    row.quant_build = ''
    if frame is None:
        return
    lifecycle.set_enabled(model, False)
    spoil_idle(model, expected)
    got, stopped = record(framework, model, frame, names)
    if stopped != row.forward:
        raise Q3DError(f'the float model stopped at {row.forward!r}, the quantized one at {stopped!r}')
    row.difference, row.worst = compare(expected, got)
    if row.difference is not None and not row.same:
        row.double = compare_in_double(framework, reference, model, frame, names, set(expected))
        if row.double is None:
            jitter(reference)
            row.jitter = compare(expected, record(framework, reference, frame, names)[0])[0]
    if not int8 or not expected:
        return
    framework.load(model, state)
    lifecycle.set_enabled(model, True)

    def forward_of(frame):
        # As far as the float model comes: what stops it stops calibration, too.
        with contextlib.suppress(Exception) if row.forward else contextlib.nullcontext():
            framework.run(model, frame)

    lifecycle.calibrate(model, [frame], forward_of)
    got, _ = record(framework, model, frame, names)
    row.int8 = int8_error(expected, got)


# All configs


def _child(pipe, framework, config: str, forward: bool, int8: bool, memory: float) -> None:
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    pipe.send(examine(framework, config, forward, int8))
    pipe.close()


def in_process(framework, config: str, forward: bool, int8: bool, timeout: float, memory: float) -> Row:
    """:func:`examine` in a process of its own.

    Args:
        framework: Whose config it is.
        config: Its name.
        forward: Whether to run the models.
        int8: Whether to run the quantized one in INT8, too.
        timeout: Seconds after which the process is ended.
        memory: GiB that it may allocate.
    """
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, framework, config, forward, int8, memory))
    start = time.time()
    child.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        reason = f'not done after {timeout:.0f} s'
    except EOFError:
        child.join()
        reason = f'the process ended with {child.exitcode}'
    finally:
        child.join(0 if child.exitcode is None else None)
        if child.is_alive():
            child.kill()
        child.join()
    row = Row(framework.name, config, seconds=time.time() - start)
    if forward:
        # What is known of a model that does not run in time is what its build says.
        row = in_process(framework, config, False, False, timeout, memory)
        if not row.ours and not row.float_build:
            row.forward = reason
    else:
        row.float_build = reason
    return row


def key_of(framework, config: str) -> str:
    """The framework's key of a config; that of no other where the config cannot be read."""
    with contextlib.suppress(Exception), open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        return framework.key(framework.read(config))
    return config


def with_forward_of(row: Row, twin: Row) -> Row:
    """The row of a config that was built, with what the forward of its twin showed."""
    if row.ours or row.float_build or twin.ours or twin.comparable != row.comparable:
        return row
    fields = ('forward', 'compared', 'difference', 'worst', 'double', 'jitter', 'int8')
    return dataclasses.replace(row, twin=twin.config, **{f: getattr(twin, f) for f in fields})


def reasons(row: Row) -> str:
    """The layers that are not quantized and why, on one line."""
    return '; '.join(
        f'{", ".join(f"{n} {kind}" for kind, n in kinds.items())}: {reason}'
        for reason, kinds in row.left.items()
    )


def outcome(row: Row) -> str:
    """What the forward pass showed, on one line."""
    if row.ours:
        return OURS
    if row.forward is None:
        return ''
    if row.difference is None:
        return row.forward or 'nothing to compare'
    text = f'{row.difference:.1e} of {row.compared}/{row.comparable} layers'
    if row.rounding:
        exact = f'in double: {row.double:.0e}' if row.double is not None else f'by rounding: {row.jitter:.1e}'
        text += f' ({exact})'
    text += f' (as {row.twin})' if row.twin else ''
    return text + (f', then {row.forward}' if row.forward else '')


def table(rows: List[Row]) -> str:
    """The rows as text, with a line of totals for each framework."""
    lines = [('config', 'layers', 'quantized', 'of weights', 'off - float', 'int8', 'float, and why')]
    for row in rows:
        if row.float_build:
            cells = ('', '', '', f'float does not build: {row.float_build}', '', '')
        else:
            done = f'{row.quantized / max(row.layers, 1):.1%}'
            elements = f'{row.quantized_elements / max(row.elements, 1):.1%}'
            int8 = '' if row.int8 is None else f'{row.int8:.3f}'
            cells = (str(row.layers), done, elements, outcome(row), int8, reasons(row))
        lines.append((row.config, *cells))
    widths = [min(90, max(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    text = ['  '.join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines]
    return '\n'.join([*text, '', *(summary(rows, name) for name in dict.fromkeys(r.framework for r in rows))])


def summary(rows: List[Row], framework: str) -> str:
    """One line about a framework."""
    rows = [r for r in rows if r.framework == framework]
    built = [r for r in rows if not r.float_build]
    quantized = [r for r in built if r.quant_build == '' and not r.ours]
    ran = [r for r in built if r.difference is not None]
    whole = [r for r in ran if r.compared == r.comparable]
    layers, elements = sum(r.layers for r in built), sum(r.elements for r in built)
    return (
        f'{framework}: {len(rows)} configs, {len(built)} built in float, {len(quantized)} of these quantized'
        f'; {len(ran)} ran ({len(whole)} through every layer), {sum(r.same for r in ran)} of these off = '
        f'float within {TOLERANCE:g}, {sum(r.rounding for r in ran)} more but for '
        f'rounding; {sum(r.quantized for r in built)} of {layers} layers quantized '
        f'({sum(r.quantized for r in built) / max(layers, 1):.1%}), '
        f'{sum(r.quantized_elements for r in built) / max(elements, 1):.1%} of the weights; '
        f'{sum(bool(r.ours) for r in rows)} failures of the plugin'
    )


def failures(rows: List[Row]) -> List[Row]:
    """Rows that show a mistake of the plugin."""
    return [r for r in rows if r.ours or (r.difference is not None and not (r.same or r.rounding))]


def read_rows(path: str) -> List[Row]:
    """The rows of an earlier run.

    Raises:
        Q3DError: The file is no such file.
    """
    try:
        return [Row(**row) for row in json.loads(Path(path).read_text())['rows']]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Q3DError(f'--resume: {path!r} is no result of this script: {error}') from error


def write_rows(path: str, rows: List[Row]) -> None:
    """Writes the result; the file appears whole or not at all."""
    write_text(path, json.dumps({'rows': [dataclasses.asdict(r) for r in rows]}, indent=1))


def parse(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--mmdet3d', nargs='?', const='', metavar='CONFIG_DIR', help='its configs; the wheel has some'
    )
    parser.add_argument('--openpcdet', nargs='?', const='', metavar='ROOT', help='a checkout of OpenPCDet')
    parser.add_argument('--only', nargs='+', default=['*'], help='patterns of configs, such as second/*')
    parser.add_argument(
        '--forward', action=argparse.BooleanOptionalAction, default=True, help='run the models'
    )
    parser.add_argument('--int8', action='store_true', help='calibrate on the frame and run in INT8, too')
    parser.add_argument('--timeout', type=float, default=900, help='seconds for one config')
    parser.add_argument('--memory', type=float, default=6, help='GiB for one config')
    parser.add_argument('--out', default=OUT, help='where the result is written, as JSON')
    parser.add_argument('--resume', action='store_true', help='go on with what --out has already')
    return parser.parse_args(arguments)


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs the script.

    Returns:
        int: 0, or 1 where a config shows a mistake of the plugin.
    """
    options = parse(arguments)
    if options.mmdet3d is None and options.openpcdet is None:
        raise Q3DError('nothing to look at: give --mmdet3d, --openpcdet ROOT, or both')
    out = Path(options.out)
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    frameworks = []
    if options.mmdet3d is not None:
        frameworks.append(MMDet3D(options.mmdet3d or None))
    if options.openpcdet is not None:
        frameworks.append(OpenPCDet(options.openpcdet or None))
    names = [(f, c) for f in frameworks for c in f.configs()]
    for pattern in options.only:
        if not fnmatch.filter([c for _, c in names], pattern):
            raise Q3DError(f'--only: {pattern!r} matches none of the {len(names)} configs')
    work = [(f, c) for f, c in names if any(fnmatch.fnmatch(c, p) for p in options.only)]
    rows = read_rows(options.out) if options.resume and out.is_file() else []
    done = {(r.framework, r.config): r for r in rows}
    first: Dict[Tuple[str, str], Row] = {}
    for i, (framework, config) in enumerate(work):
        key = (framework.name, key_of(framework, config))
        twin = first.get(key)
        if (framework.name, config) in done:
            first.setdefault(key, done[framework.name, config])
            continue
        forward = options.forward and twin is None
        row = in_process(framework, config, forward, options.int8, options.timeout, options.memory)
        row = row if twin is None else with_forward_of(row, twin)
        first.setdefault(key, row)
        rows.append(row)
        write_rows(options.out, rows)
        state = row.float_build and f'float does not build: {row.float_build}' or outcome(row)
        print(f'[{i + 1}/{len(work)}] {config}: {state} ({row.seconds:.0f} s)', flush=True)
    print(table(rows))
    for row in failures(rows):
        print(f'\n{row.config}: off - float {row.difference} at {row.worst}\n{row.ours}')
    return int(bool(failures(rows)))


if __name__ == '__main__':
    try:
        sys.exit(main())
    except Q3DError as error:
        sys.exit(f'zoo: {error}')
