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
    """Mends two gaps of spconv's CPU build.

    ``indice_conv`` asserts that there is no bias outside of training, and ``indice_conv_backward`` asks for
    the current CUDA stream, which raises. The bias is added here after the convolution instead, and the
    stream (which the CPU kernels do not read) is reported as 0.
    """
    if torch.cuda.is_available():
        return
    try:
        from spconv.pytorch import ops
    except ImportError:
        return
    if getattr(ops.indice_conv, '_q3d_patched', False):
        return
    ops.get_current_stream = lambda: 0
    plain = ops.indice_conv

    @functools.wraps(plain)
    def indice_conv(
        features,
        filters,
        indice_pairs,
        indice_pair_num,
        num_activate_out,
        inverse=False,
        subm=False,
        algo=ops.ConvAlgo.Native,
        timer=None,
        bias=None,
        *args,
        **kwargs,
    ):
        out = plain(
            features,
            filters,
            indice_pairs,
            indice_pair_num,
            num_activate_out,
            inverse,
            subm,
            algo,
            timer,
            None,
            *args,
            **kwargs,
        )
        return out if bias is None else out + bias

    indice_conv._q3d_patched = True
    ops.indice_conv = indice_conv
