"""Checks of what only CUDA shows; the command is ``q3d check-gpu``, the script tools/check_gpu.sh."""
