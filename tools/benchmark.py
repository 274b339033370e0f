"""What quantization costs: time and memory of a model, float and quantized, side by side in one run.

    python tools/benchmark.py [--config CONFIG.py] [--frame POINTS.bin] [--out RESULT.json]

Measured are the statistics pass and the simulated INT8 forward against the float forward, the ranges of the
whole model by every calibrator, and the peak memory. pytorch-quantization's own calibrators are the peer:
they see the same tensors in the same run, where they run on this machine. The weights are random (seeded) and
the BatchNorm statistics are those of the frame, so no checkpoint is needed.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == '__main__':
    # Python puts this folder first on the path, where its scripts would shadow modules of the standard
    # library (profile.py, for example).
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or '.') != HERE]

import argparse  # noqa: E402
import contextlib  # noqa: E402
import copy  # noqa: E402
import dataclasses  # noqa: E402
import importlib  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import uuid  # noqa: E402
import weakref  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Dict, List, Optional, Tuple  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: E402
from tqdm import tqdm  # noqa: E402

from q3d_plugin import lifecycle, numerics  # noqa: E402
from q3d_plugin.calibration import collect, compute_ranges  # noqa: E402
from q3d_plugin.errors import Q3DError  # noqa: E402
from q3d_plugin.files import check_writable  # noqa: E402
from q3d_plugin.layers import QuantWeightLayer  # noqa: E402
from q3d_plugin.quantizer import Mode, Quantizer  # noqa: E402
from q3d_plugin.recipe import CALIBRATORS, WEIGHT_CALIBRATORS, Recipe  # noqa: E402

CONFIG = 'configs/mmdet3d/centerpoint_voxel0075_second_secfpn_nus_w8a8.py'
OUT = 'work_dirs/benchmark/benchmark.json'
STATISTICS_TARGET = 1.3
INT8_TARGET = 1.35
RANGES_TARGET = 3.0
MEMORY_TARGET = 1.3
# A keyframe of nuScenes has about as many.
POINTS = 34_688
MEMORY_MODES = ('float', 'statistics', 'int8')
FLOAT, FOLDED, STATISTICS, INT8 = (
    'float forward, BatchNorm unfolded',
    'float forward, BatchNorm folded',
    'statistics pass',
    'simulated INT8 forward',
)
PEER = 'pytorch-quantization'
WITH_RANGE = (Mode.SIGNED, Mode.UNSIGNED)
NOTES = (
    'Timed is the forward pass from voxels to the maps of the head; voxelization, box decoding and NMS are '
    'outside.',
    'Ratios are medians of the ratios within a round; in each round every mode runs once, in turn.',
    "q3d's ranges take activations and weights by the named calibrator (entropy: weights by max). The peer's "
    'weights are taken by its MaxCalibrator, as its own examples do.',
    'The peer sees each shared tensor once, as q3d does; on its own it has one calibrator per layer.',
    'Error: squared error of all fake-quantized activations of this one frame over that with the max range; '
    'mean, least and largest of all tensors.',
    'Memory is that of a fresh process per mode, with weights, ranges and voxels read from a file; '
    'freed blocks above 1 MiB go back to the system at once.',
)


@dataclasses.dataclass
class Row:
    """One line of the table.

    Attributes:
        section: ``'time'``, ``'ranges'``, ``'memory'`` or ``'error'``.
        name: What was measured.
        value: The number; None where it could not be measured.
        unit: Of ``value``.
        ratio: Against the float forward, where that means something.
        cpu_ratio: The same in processor time, which other processes on the machine disturb less.
        spread: Smallest and largest ratio of all rounds.
        target: Upper bound of the ratio, or of the value where there is no ratio.
        passed: Whether the target is met; None where there is none.
        note: What a reader has to know to read the number.
    """

    section: str
    name: str
    value: Optional[float]
    unit: str
    ratio: Optional[float] = None
    cpu_ratio: Optional[float] = None
    spread: Optional[Tuple[float, float]] = None
    target: Optional[float] = None
    passed: Optional[bool] = dataclasses.field(init=False, default=None)
    note: str = ''

    def __post_init__(self) -> None:
        measured = self.value if self.ratio is None else self.ratio
        if self.target is not None and measured is not None:
            self.passed = measured <= self.target


# The frame


def read_frame(path: str) -> np.ndarray:
    """The points of a LiDAR file of nuScenes.

    Args:
        path: File of float32 ``x y z intensity ring``.

    Returns:
        np.ndarray: (N, 5) with the time lag 0 in place of the ring, as MMDetection3D's pipeline feeds a
        keyframe.

    Raises:
        Q3DError: The file is missing or is no such file.
    """
    if not Path(path).is_file():
        raise Q3DError(f'frame {path!r} is not a file')
    size = Path(path).stat().st_size
    if size == 0 or size % 20:
        raise Q3DError(
            f'frame {path!r} has {size} bytes, which is not a whole number of points of 5 float32 '
            '(x y z intensity ring)'
        )
    points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)
    if not np.isfinite(points).all():
        raise Q3DError(f'frame {path!r} holds NaN or Inf: its points have to be float32 x y z intensity ring')
    points[:, 4] = 0
    return points


def _toy_module(name: str):
    """A module of the toy nuScenes' generator, which lies beside this script and is not installed."""
    if 'toy_nuscenes' not in sys.modules:
        folder = os.path.join(HERE, 'toy_nuscenes')
        spec = importlib.util.spec_from_file_location(
            'toy_nuscenes', os.path.join(folder, '__init__.py'), submodule_search_locations=[folder]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules['toy_nuscenes'] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f'toy_nuscenes.{name}')


def generated_frame(count: int = POINTS, seed: int = 0) -> np.ndarray:
    """Points of a scene of the toy nuScenes.

    Its sweeps are thinner than those of nuScenes, so that several of the same instant are merged: that comes
    near the number of points and of voxels of a real keyframe. (Sweeps of several instants have half as many
    voxels again.)

    Args:
        count: Number of points.
        seed: Of scene and noise.

    Returns:
        np.ndarray: (count, 5) float32 x, y, z, intensity, time lag 0.
    """
    geometry, lidar, scene_module = (_toy_module(name) for name in ('geometry', 'lidar', 'scene'))
    rng = np.random.default_rng(seed)
    scene = scene_module.make_scene(rng, np.zeros(2), 1)
    ground = np.array([scene.ground[0] - scene.ground[1:] @ scene.origin, *scene.ground[1:]])
    position, vehicle = scene.ego_pose(0.0)
    position, rotation = position + vehicle @ np.array([0.94, 0.0, 1.84]), geometry.rotation_z(-np.pi / 2)
    solids, sweeps = scene.solids(0.0), []
    while sum(map(len, sweeps)) < count:
        sweep = lidar.cast(solids, len(scene.instances), ground, position, vehicle @ rotation, rng)
        sweeps.append(sweep.points)
    points = np.concatenate(sweeps).astype(np.float32)
    points[:, 4] = 0
    return points[np.sort(rng.permutation(len(points))[:count])]


# The models


def read_config(path: str):
    """The config and its recipe.

    Args:
        path: An MMDetection3D config with Quant types.

    Returns:
        tuple: Config and Recipe.

    Raises:
        Q3DError: The file is missing, does not parse, or has no model or no recipe.
    """
    from mmengine.config import Config

    if not Path(path).is_file():
        raise Q3DError(f'config {path!r} is not a file')
    try:
        config = Config.fromfile(path)
    except Exception as error:  # whatever a Python file can raise
        first = (str(error).splitlines() or [''])[0]
        raise Q3DError(f'config {path!r} cannot be read: {type(error).__name__}: {first}') from error
    hooks = [h for h in config.get('custom_hooks', []) if h.get('type') == 'QuantHook']
    if 'model' not in config or not hooks:
        raise Q3DError(f'config {path!r} has no ' + ('QuantHook' if 'model' in config else 'model'))
    if 'pts_bbox_head' not in config.model:
        raise Q3DError(
            f'config {path!r}: only models with a pts_bbox_head, such as CenterPoint, are measured'
        )
    recipe = hooks[0].get('recipe')
    return config, Recipe.from_dict(recipe.to_dict() if hasattr(recipe, 'to_dict') else recipe)


def strip_quant(node: Any) -> None:
    """Takes ``Quant`` off the types of a config that have a float one, in place."""
    from mmdet3d.registry import MODELS

    if isinstance(node, dict):
        kind = node.get('type')
        if isinstance(kind, str) and kind.startswith('Quant') and MODELS.get(kind[5:]) is not None:
            node['type'] = kind[5:]
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list, tuple)):
            strip_quant(child)


def build_model(config, quantized: bool, recipe: Recipe, device: torch.device) -> nn.Module:
    """A model of the config in eval mode, with random weights that are the same every time.

    Args:
        config: MMEngine config.
        quantized: Whether to keep the Quant types and give them their quantizers.
        recipe: For the quantizers.
        device: Where to put it.
    """
    from mmdet3d.registry import MODELS
    from mmengine.registry import init_default_scope

    import q3d_plugin.mmdet3d  # noqa: F401  (registers the Quant types)

    init_default_scope('mmdet3d')
    node = copy.deepcopy(config.model)
    if not quantized:
        strip_quant(node)
    torch.manual_seed(0)
    try:
        model = MODELS.build(node).to(device).eval()
    except Exception as error:
        first = (str(error).splitlines() or [''])[0]
        raise Q3DError(f'model of the config does not build: {type(error).__name__}: {first}') from error
    if quantized:
        lifecycle.configure(model, recipe)
    return model


def forward(model: nn.Module, inputs: Dict[str, Any]) -> Any:
    """From voxels to the maps of the head."""
    _, features = model.extract_feat(inputs, [{}])
    return model.pts_bbox_head(features)


@torch.no_grad()
def settle_batch_norm(model: nn.Module, inputs: Dict[str, Any]) -> None:
    """Gives every BatchNorm the statistics of ``inputs``, so that activations have the sizes of a trained
    model's."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    before = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    forward(model, inputs)
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum
        norm.eval()


def voxelize(model: nn.Module, points: np.ndarray) -> Dict[str, Any]:
    """What the model's own preprocessor makes of a frame, without the points that no part of it reads."""
    from mmdet3d.structures import Det3DDataSample

    data = {'inputs': {'points': [torch.from_numpy(points)]}, 'data_samples': [Det3DDataSample()]}
    voxels = model.data_preprocessor(data, False)['inputs']['voxels']
    return {'voxels': {k: voxels[k] for k in ('voxels', 'num_points', 'coors')}}


# The modes


@contextlib.contextmanager
def disabled(quantizers: List[Quantizer]) -> Iterator[None]:
    """Within, ``quantizers`` let their input through."""
    for quantizer in quantizers:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()


class Subject:
    """A float model, the quantized one with the same weights, and a frame.

    Attributes:
        float_model: With BatchNorm.
        model: Quantized and calibrated on the frame.
        inputs: Voxels of the frame.
        points: Number of points of the frame.
    """

    def __init__(self, config, recipe: Recipe, points: np.ndarray, device: torch.device) -> None:
        from mmengine.runner.checkpoint import load_state_dict

        self.device, self.points = device, len(points)
        self.float_model = build_model(config, False, recipe, device)
        self.inputs = voxelize(self.float_model, points)
        if not len(self.inputs['voxels']['coors']):
            raise Q3DError("frame: not one point is within the config's point cloud range")
        settle_batch_norm(self.float_model, self.inputs)
        self.model = build_model(config, True, recipe, device)
        load_state_dict(self.model, self.float_model.state_dict(), strict=False)
        lifecycle.calibrate(self.model, [self.inputs], lambda x: forward(self.model, x))
        # What saw no data was left float, and has no part in this.
        ranged = [q for q in lifecycle.quantizers(self.model) if q.mode in WITH_RANGE]
        self.weights = [q for q in ranged if q.per_channel]
        self.activations = [q for q in ranged if not q.per_channel]

    @property
    def quantizers(self) -> List[Quantizer]:
        """Those of activations, then those of weights."""
        return [*self.activations, *self.weights]

    @torch.no_grad()
    def run_float(self) -> None:
        forward(self.float_model, self.inputs)

    @torch.no_grad()
    def run_folded(self) -> None:
        with disabled(self.quantizers):
            forward(self.model, self.inputs)

    def run_statistics(self) -> None:
        with disabled(self.weights):
            collect(self.model, [self.inputs], lambda x: forward(self.model, x), self.activations)
        for quantizer in self.activations:
            quantizer.observer = None

    @torch.no_grad()
    def run_int8(self) -> None:
        forward(self.model, self.inputs)

    @torch.no_grad()
    def visit(self, function: Callable[[int, Tensor], None]) -> None:
        """Runs the folded float model and calls ``function(index of the quantizer, input)``, once per
        distinct tensor, where an activation quantizer reads one."""
        last: Dict[int, Tuple] = {}

        def hook(index: int) -> Callable:
            def seen(_, args) -> None:
                x = args[0]
                before = last.get(index)
                if x.numel() and not (before and before[0]() is x and before[1] == x._version):
                    last[index] = (weakref.ref(x), x._version)
                    function(index, x)

            return seen

        handles = [q.register_forward_pre_hook(hook(i)) for i, q in enumerate(self.activations)]
        try:
            self.run_folded()
        finally:
            for handle in handles:
                handle.remove()


class Peer:
    """pytorch-quantization's calibrators, one per activation quantizer of a :class:`Subject`."""

    def __init__(self, subject: Subject) -> None:
        from absl import logging
        from pytorch_quantization import calib

        logging.set_verbosity(logging.ERROR)
        self.calib, self.subject = calib, subject
        self.max: List = []
        self.histograms: List = []

    def run_max(self) -> None:
        """A forward pass with MaxCalibrators."""
        self.max = [
            self.calib.MaxCalibrator(q.spec.bits, None, q.mode is Mode.UNSIGNED)
            for q in self.subject.activations
        ]
        self.subject.visit(lambda i, x: self.max[i].collect(x))

    def run_histogram(self) -> None:
        """A forward pass with HistogramCalibrators."""
        self.histograms = [
            self.calib.HistogramCalibrator(q.spec.bits, None, q.mode is Mode.UNSIGNED)
            for q in self.subject.activations
        ]
        self.subject.visit(lambda i, x: self.histograms[i].collect(x))

    def weight_ranges(self) -> None:
        """Per-channel ranges of all weights by its MaxCalibrator."""
        for layer in weight_layers(self.subject.model):
            calibrator = self.calib.MaxCalibrator(layer.weight_quantizer.spec.bits, 0, False)
            calibrator.collect(layer.output_first(layer.weight.detach()))
            calibrator.compute_amax()


def weight_layers(model: nn.Module) -> List[QuantWeightLayer]:
    """The layers of ``model`` whose weight is quantized."""
    layers = [m for m in model.modules() if isinstance(m, QuantWeightLayer)]
    return [m for m in layers if m.weight_quantizer is not None and m.weight_quantizer.mode in WITH_RANGE]


# The measurements


def synchronize(device: torch.device) -> None:
    """Waits for what was started on ``device``."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds(function: Callable, device: torch.device) -> float:
    """How long one call takes."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def measure_time(subject: Subject, peer: Peer, repeats: int, bar: tqdm) -> List[Row]:
    """The forward passes, interleaved: the speed of a machine drifts, and a ratio within a round does not.

    Args:
        subject: What to run.
        peer: What to compare with.
        repeats: Number of rounds; one more comes first and is not counted.
        bar: Progress.
    """
    modes = {
        FLOAT: (subject.run_float, None, ''),
        FOLDED: (subject.run_folded, None, 'quantizers off'),
        STATISTICS: (subject.run_statistics, STATISTICS_TARGET, ''),
        INT8: (subject.run_int8, INT8_TARGET, ''),
        f'{PEER} max statistics': (peer.run_max, None, 'peer'),
        f'{PEER} histogram statistics': (peer.run_histogram, None, 'peer'),
    }
    times: Dict[str, List[float]] = {name: [] for name in modes}
    processor: Dict[str, List[float]] = {name: [] for name in modes}
    for number in range(repeats + 1):
        for name, (function, _, _) in modes.items():
            bar.set_postfix_str(name, refresh=False)
            start = time.process_time()
            taken = seconds(function, subject.device)
            if number:
                times[name].append(taken)
                processor[name].append(time.process_time() - start)
            bar.update()
    rows = []
    for name, (_, target, note) in modes.items():
        ratios = [a / b for a, b in zip(times[name], times[FLOAT])]
        spread = (min(ratios), max(ratios))
        value, ratio = statistics.median(times[name]), statistics.median(ratios)
        cpu_ratio = statistics.median(a / b for a, b in zip(processor[name], processor[FLOAT]))
        rows.append(Row('time', name, value, 's', ratio, cpu_ratio, spread, target, note=note))
    return rows


Ranges = Dict[str, Dict[int, float]]


def measure_ranges(subject: Subject, bar: tqdm) -> Tuple[List[Row], Ranges]:
    """All ranges of the model by each of q3d's calibrators.

    Args:
        subject: Its quantizers are left as they were.
        bar: Progress.

    Returns:
        tuple: Rows, and the ranges of the activations by calibrator and index of the quantizer.
    """
    activations, layers = subject.activations, weight_layers(subject.model)
    with disabled(subject.weights):
        collect(subject.model, [subject.inputs], lambda x: forward(subject.model, x), activations)
    observers = [q.observer for q in activations]
    before = [(q, q.spec, q._amax.clone(), q.mode) for q in subject.quantizers]
    rows, ranges = [], {}

    def weights() -> None:
        for layer in layers:
            layer.calibrate_weight()

    for calibrator in CALIBRATORS:
        bar.set_postfix_str(f'ranges by {calibrator}', refresh=False)
        for_weights = calibrator if calibrator in WEIGHT_CALIBRATORS else 'max'
        for quantizer in subject.quantizers:
            kind = for_weights if quantizer.per_channel else calibrator
            quantizer.spec = dataclasses.replace(quantizer.spec, calibrator=kind)
        for quantizer, observer in zip(activations, observers):
            quantizer.observer = observer
        first = seconds(lambda: compute_ranges(activations), subject.device)
        ranges[calibrator] = {i: q._amax.item() for i, q in enumerate(activations)}
        second = seconds(weights, subject.device)
        note = f'{first:.2f} s activations, {second:.2f} s weights'
        rows.append(Row('ranges', calibrator, first + second, 's', target=RANGES_TARGET, note=note))
        bar.update()
    for quantizer, spec, amax, mode in before:
        quantizer.spec = spec
        quantizer.set_range(amax, mode is Mode.UNSIGNED)
    return rows, ranges


def measure_peer_ranges(peer: Peer, entropy_tensors: int, bar: tqdm) -> Tuple[List[Row], Ranges]:
    """The same ranges by pytorch-quantization, from the statistics of its last passes.

    Args:
        peer: After :meth:`Peer.run_max` and :meth:`Peer.run_histogram`.
        entropy_tensors: Entropy takes seconds a tensor: on how many to time it.
        bar: Progress.

    Returns:
        tuple: Rows, and the ranges of the activations by method and index of the quantizer.
    """
    device, total = peer.subject.device, len(peer.histograms)
    rows, ranges = [], {}
    weights = seconds(peer.weight_ranges, device)
    chosen = sorted({int(i) for i in np.linspace(0, total - 1, min(entropy_tensors, total))})
    for method in ('max', 'percentile', 'mse', 'entropy'):
        name = f'{PEER} {method}'
        bar.set_postfix_str(f'ranges by {name}', refresh=False)
        indices = chosen if method == 'entropy' else range(total)
        found: Dict[int, float] = {}

        def compute(method=method, indices=indices, found=found) -> None:
            for i in indices:
                if method == 'max':
                    found[i] = float(peer.max[i].compute_amax())
                else:
                    found[i] = float(peer.histograms[i].compute_amax(method))

        try:
            taken = seconds(compute, device)
        except (AssertionError, RuntimeError) as error:
            cuda = method == 'mse' and not torch.cuda.is_available()
            reason = 'needs CUDA' if cuda else f'fails: {(str(error).splitlines() or [""])[0]}'
            rows.append(Row('ranges', name, None, 's', note=reason))
        else:
            ranges[method] = found
            if method == 'entropy':
                note = f'per tensor, timed on {len(found)} of {total} activations'
                rows.append(Row('ranges', name, taken / max(len(found), 1), 's a tensor', note=note))
            else:
                note = f'{taken:.2f} s activations, {weights:.2f} s weights (by max)'
                rows.append(Row('ranges', name, taken + weights, 's', note=note))
        bar.update()
    return rows, ranges


def measure_error(subject: Subject, ranges: Ranges, peer_ranges: Ranges, bar: tqdm) -> List[Row]:
    """Squared error of the activations under each set of ranges, relative to the max range's.

    Args:
        subject: Its frame is the one that the ranges are of.
        ranges: Of q3d.
        peer_ranges: Of pytorch-quantization; those of entropy for a part of the tensors.
        bar: Progress.
    """
    bar.set_postfix_str('error of the ranges', refresh=False)
    named = {name: ranges[name] for name in CALIBRATORS}
    subset = peer_ranges.get('entropy', {})
    if subset:
        named['entropy, those tensors'] = {i: ranges['entropy'][i] for i in subset}
    named.update({f'{PEER} {name}': found for name, found in peer_ranges.items() if name != 'max'})
    errors: Dict[str, Dict[int, float]] = {name: {} for name in named}

    def add(index: int, x: Tensor) -> None:
        quantizer = subject.activations[index]
        for name, found in named.items():
            if index in found:
                amax = torch.tensor(found[index], device=x.device)
                out = numerics.fake_quantize(x, amax, quantizer.spec.bits, quantizer.mode is Mode.UNSIGNED)
                error = out.sub_(x).square_().sum(dtype=torch.float64).item()
                errors[name][index] = errors[name].get(index, 0.0) + error

    subject.visit(add)
    bar.update()
    rows = []
    for name in named:
        relative = [e / errors['max'][i] for i, e in errors[name].items() if errors['max'][i] > 0]
        if relative:
            spread = (min(relative), max(relative))
            note = f'{len(relative)} tensors'
            rows.append(Row('error', name, statistics.fmean(relative), 'of max', spread=spread, note=note))
    return rows


def peak_memory() -> Tuple[int, int]:
    """Present and largest resident memory of this process, in bytes."""
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
        found = {line.split(':')[0]: line.split()[1] for line in lines if line.startswith(('VmHWM', 'VmRSS'))}
        # getrusage would be at least the memory of the parent at the time of the fork.
        return int(found['VmRSS']) * 1024, int(found['VmHWM']) * 1024
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == 'darwin' else 1024
        return peak, peak


def memory_of(mode: str, config_path: str, folder: Path) -> Dict[str, int]:
    """What a forward pass of ``mode`` needs, in this process, which has to be a fresh one.

    Args:
        mode: One of :data:`MEMORY_MODES`.
        config_path: The config.
        folder: Where :func:`measure_memory` put weights and voxels.

    Returns:
        dict: Bytes: ``before`` the pass, and at its ``peak``.
    """
    config, recipe = read_config(config_path)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model = build_model(config, mode != 'float', recipe, device)
    name = 'float.pth' if mode == 'float' else 'quantized.pth'
    model.load_state_dict(torch.load(folder / name, map_location=device))
    inputs = torch.load(folder / 'inputs.pth', map_location=device)
    quantizers = lifecycle.quantizers(model)
    weights = [q for q in quantizers if q.per_channel]
    activations = [q for q in quantizers if not q.per_channel]
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        # Linux only: from here on counts the peak, not what building the model took.
        with contextlib.suppress(OSError):
            Path('/proc/self/clear_refs').write_text('5')
        before = peak_memory()[0]
    # Twice: the second pass meets the memory that the first one gave back.
    for _ in range(2):
        if mode == 'statistics':
            with disabled(weights):
                collect(model, [inputs], lambda x: forward(model, x), activations)
        else:
            with torch.no_grad():
                forward(model, inputs)
    peak = torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else peak_memory()[1]
    return {'before': before, 'peak': peak}


def measure_memory(subject: Subject, config_path: str, bar: tqdm) -> List[Row]:
    """Peak memory of the modes, each in a fresh process.

    Args:
        subject: Whose weights, ranges and voxels are used.
        config_path: The config.
        bar: Progress.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(subject.float_model.state_dict(), Path(folder) / 'float.pth')
        torch.save(subject.model.state_dict(), Path(folder) / 'quantized.pth')
        torch.save(subject.inputs, Path(folder) / 'inputs.pth')
        for mode in MEMORY_MODES:
            bar.set_postfix_str(f'memory of {mode}', refresh=False)
            command = [sys.executable, os.path.abspath(__file__), '--config', config_path]
            command += ['--memory-of', mode, '--memory-from', folder]
            command += ['--threads', str(torch.get_num_threads())]
            # glibc keeps freed blocks of up to 32 MiB, in other places each time: the same mode would differ
            # by 80 MiB from run to run.
            environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': str(2**20)}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ['no message'])[-1]
                raise Q3DError(f'memory of {mode}: the process ended with {done.returncode}: {last}')
            found[mode] = json.loads(done.stdout.splitlines()[-1])
            bar.update()
    rows = []
    for title, measure in (
        ('the process', lambda m: m['peak']),
        ('the forward pass', lambda m: m['peak'] - m['before']),
    ):
        reference = measure(found['float'])
        for mode, name in zip(MEMORY_MODES, (FLOAT, STATISTICS, INT8)):
            value, target = measure(found[mode]), None if mode == 'float' else MEMORY_TARGET
            ratio = value / reference if reference else None
            rows.append(Row('memory', f'{title}: {name}', value / 2**20, 'MiB', ratio, target=target))
    return rows


# The report


def table(rows: List[Row], headline: str) -> str:
    """The rows as a text table with the notes below it."""

    def number(value: Optional[float], digits: int = 3) -> str:
        return '' if value is None else f'{value:.{digits}f}'

    titles = {
        'time': ('forward pass', 'of float'),
        'ranges': ('all ranges of the model', ''),
        'memory': ('peak memory', 'of float'),
        'error': ('error of the ranges', ''),
    }
    lines, missed = [headline], 0
    width = max(len(r.name) for r in rows)
    for section, (title, against) in titles.items():
        members = [r for r in rows if r.section == section]
        if not members:
            continue
        in_cpu = 'in CPU s' if section == 'time' else ''
        lines.append('')
        lines.append(f'{title:{width}}  {"":>18}  {against:>8}  {in_cpu:>8}  {"spread":>13}  {"target":>7}')
        for row in members:
            value = (
                '-' if row.value is None else f'{number(row.value, 1 if row.unit == "MiB" else 3)} {row.unit}'
            )
            spread = '' if row.spread is None else '..'.join(number(s, 2) for s in row.spread)
            target = '' if row.target is None else f'<= {row.target:g}'
            verdict = {None: '', True: 'pass', False: 'MISSED'}[row.passed]
            missed += row.passed is False
            line = f'{row.name:{width}}  {value:>18}  {number(row.ratio):>8}  '
            line += f'{number(row.cpu_ratio):>8}  {spread:>13}  {target:>7}  {verdict:8}{row.note}'
            lines.append(line.rstrip())
    lines += ['', *NOTES]
    verb = 'target is' if missed == 1 else 'targets are'
    lines.append(f'{missed} {verb} missed' if missed else 'every target is met')
    return '\n'.join(lines)


def write_json(path: Path, content: Dict[str, Any]) -> None:
    """Writes a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}.tmp')
    try:
        temporary.write_text(json.dumps(content, indent=1) + '\n')
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--config', default=CONFIG, help='MMDetection3D config with Quant types')
    parser.add_argument('--frame', help='float32 x y z intensity ring; a generated frame where not given')
    parser.add_argument('--repeats', type=int, default=5, help='rounds that are timed')
    parser.add_argument('--out', default=OUT, help='JSON file for the table')
    parser.add_argument('--threads', type=int, help="threads of the CPU; torch's own choice where not given")
    parser.add_argument(
        '--entropy-tensors', type=int, default=4, help="activations that the peer's entropy is timed on"
    )
    parser.add_argument('--strict', action='store_true', help='exit with 1 where a target is missed')
    # How this script calls itself for the memory of one mode.
    parser.add_argument('--memory-of', choices=MEMORY_MODES, help=argparse.SUPPRESS)
    parser.add_argument('--memory-from', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (('repeats', 1), ('threads', 1), ('entropy_tensors', 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            option = name.replace('_', '-')
            raise Q3DError(f'--{option}: {value} was given; an integer from {least} up would work')
    return args


def benchmark(args: argparse.Namespace) -> int:
    """Measures everything, prints the table and writes the file.

    Args:
        args: From :func:`parse`.

    Returns:
        int: Exit status.
    """
    out = Path(args.out)
    if out.is_dir():
        raise Q3DError(f'--out: {args.out!r} is a folder; a file such as {OUT!r} would work')
    check_writable(out.parent)
    points = generated_frame() if args.frame is None else read_frame(args.frame)
    config, recipe = read_config(args.config)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    steps = 6 * (args.repeats + 1) + len(CALIBRATORS) + 4 + 1 + len(MEMORY_MODES)
    with tqdm(total=steps, desc='benchmark') as bar:
        subject = Subject(config, recipe, points, device)
        peer = Peer(subject)
        rows = measure_time(subject, peer, args.repeats, bar)
        found, ranges = measure_ranges(subject, bar)
        rows += found
        found, peer_ranges = measure_peer_ranges(peer, args.entropy_tensors, bar)
        rows += found
        rows += measure_memory(subject, args.config, bar)
        rows += measure_error(subject, ranges, peer_ranges, bar)
    meta = {
        'config': Path(args.config).name,
        'frame': 'generated' if args.frame is None else 'recorded',
        'points': subject.points,
        'voxels': len(subject.inputs['voxels']['coors']),
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu',
        'threads': torch.get_num_threads(),
        'rounds': args.repeats,
        'activations': len(subject.activations),
        'weights': len(subject.weights),
        'torch': torch.__version__,
        'python': platform.python_version(),
    }
    headline = (
        f'{meta["config"]}: {meta["frame"]} frame, {meta["points"]} points, {meta["voxels"]} voxels; '
        f'{meta["device"]}, {meta["threads"]} threads, {meta["rounds"]} rounds; '
        f'{meta["activations"]} activation and {meta["weights"]} weight quantizers'
    )
    print(table(rows, headline))
    passed = all(r.passed is not False for r in rows)
    content = {**meta, 'passed': passed, 'rows': [dataclasses.asdict(r) for r in rows], 'notes': NOTES}
    write_json(out, content)
    print(f'written to {args.out}')
    return 1 if args.strict and not passed else 0


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the benchmark.

    Args:
        argv: Arguments; those of the command line where None.

    Returns:
        int: 0, or 1 where a target is missed and ``--strict`` is given, or 2 for a mistake of the user, which
        is named in one line.
    """
    try:
        args = parse(argv)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        if args.memory_of is not None:
            print(json.dumps(memory_of(args.memory_of, args.config, Path(args.memory_from))))
            return 0
        return benchmark(args)
    except Q3DError as error:
        sys.stderr.write(f'q3d_plugin: {error}\n')
        return 2


if __name__ == '__main__':
    sys.exit(main())
