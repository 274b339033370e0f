"""Generator of a small synthetic data set in the exact nuScenes format (`v1.0-mini`).

:mod:`q3d_plugin.commands.toy_data` is its command.
"""
