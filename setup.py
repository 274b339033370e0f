"""Ships ``configs/`` inside the package, as ``q3d_plugin/configs``; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=['q3d_plugin*']), 'q3d_plugin.configs'],
    package_dir={'q3d_plugin.configs': 'configs'},
    package_data={'q3d_plugin.configs': ['**/*.py', '**/*.yaml', '**/*.pth']},
)
