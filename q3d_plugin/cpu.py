"""CPU mode: lets unmodified frameworks run on a machine without CUDA.

Each function patches one thing and does nothing where CUDA is available, so that the same command lines work
on a workstation, on a laptop and in CI. The patches are idempotent.
"""

import functools

import torch

__all__ = ['enable_cpu_mode', 'patch_distributed', 'patch_spconv']


def enable_cpu_mode() -> bool:
    """Applies every patch of this module where there is no CUDA device.

    Returns:
        bool: True where CPU mode is on, False where CUDA is available and nothing was touched.
    """
    if torch.cuda.is_available():
        return False
    patch_distributed()
    patch_spconv()
    return True


def patch_distributed() -> None:
    """Lets MMEngine run several ranks over gloo.

    It calls ``torch.cuda.set_device`` for every backend, and names a device for ``DistributedDataParallel``,
    which refuses one where the model is on the CPU.
    """
    if torch.cuda.is_available() or getattr(torch.cuda.set_device, '_q3d_patched', False):
        return

    @functools.wraps(torch.cuda.set_device)
    def set_device(device):
        return None

    set_device._q3d_patched = True
    torch.cuda.set_device = set_device

    wrapper = torch.nn.parallel.DistributedDataParallel
    plain = wrapper.__init__

    @functools.wraps(plain)
    def init(self, module, device_ids=None, output_device=None, *args, **kwargs):
        plain(self, module, None, None, *args, **kwargs)

    wrapper.__init__ = init


def patch_spconv() -> None:
    """Puts a sparse convolution of torch operations in the place of that of spconv's CPU build.

    Three gaps of spconv 2.3.8 are closed by it. With more than one thread its CPU scatter loses additions,
    so that the same input gives another result in each run, wrong by tens of per cent; it asserts that there
    is no bias outside of training; and its backward asks for the current CUDA stream, which raises.
    """
    if torch.cuda.is_available():
        return
    try:
        from spconv.constants import ALL_WEIGHT_IS_KRSC
        from spconv.pytorch import ops
    except ImportError:
        return
    if not ALL_WEIGHT_IS_KRSC or getattr(ops.indice_conv, '_q3d_patched', False):
        return
    ops.indice_conv, ops.indice_conv_backward = _indice_conv, _indice_conv_backward


def _offsets(indice_pairs, indice_pair_num, volume, inverse, subm):
    """For each kernel offset with neighbours: its number, the rows read and the rows written."""
    numbers, centre = indice_pair_num.tolist(), volume // 2
    for k in range(volume):
        if subm and k == centre:
            continue  # every voxel with itself: no indices are kept for it
        # A submanifold convolution counts one half of the offsets; the other half mirrors it.
        count = numbers[volume - k - 1] if subm and k > centre else numbers[k]
        if count > 0:
            yield k, indice_pairs[int(inverse), k, :count], indice_pairs[int(not inverse), k, :count]


def _indice_conv(
    features,
    filters,
    indice_pairs,
    indice_pair_num,
    num_activate_out,
    inverse=False,
    subm=False,
    algo=None,
    timer=None,
    bias=None,
    *args,
    **kwargs,
):
    """``spconv.pytorch.ops.indice_conv``: gather, multiply and add, one kernel offset after the other."""
    weight = filters.reshape(filters.shape[0], -1, filters.shape[-1])
    volume = weight.shape[1]
    if subm:
        out = features @ weight[:, volume // 2].T
    else:
        out = features.new_zeros(num_activate_out, weight.shape[0])
    for k, read, written in _offsets(indice_pairs, indice_pair_num, volume, inverse, subm):
        out.index_add_(0, written, features.index_select(0, read) @ weight[:, k].T)
    return out if bias is None else out + bias


_indice_conv._q3d_patched = True


def _indice_conv_backward(
    features,
    filters,
    out_bp,
    indice_pairs,
    indice_pair_num,
    inverse=False,
    subm=False,
    *args,
    **kwargs,
):
    """``spconv.pytorch.ops.indice_conv_backward``: gradients of the features and of the weight."""
    weight = filters.reshape(filters.shape[0], -1, filters.shape[-1])
    volume = weight.shape[1]
    weight_gradient = torch.zeros_like(weight)
    if subm:
        gradient = out_bp @ weight[:, volume // 2]
        weight_gradient[:, volume // 2] = out_bp.T @ features
    else:
        gradient = torch.zeros_like(features)
    for k, read, written in _offsets(indice_pairs, indice_pair_num, volume, inverse, subm):
        arrived = out_bp.index_select(0, written)
        gradient.index_add_(0, read, arrived @ weight[:, k])
        weight_gradient[:, k] = arrived.T @ features.index_select(0, read)
    return gradient, weight_gradient.reshape(filters.shape)
