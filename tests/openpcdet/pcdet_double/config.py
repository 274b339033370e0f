"""Configs in YAML, with OpenPCDet's rules of merging."""

from ast import literal_eval
from pathlib import Path

import yaml
from easydict import EasyDict


def merge_new_config(config, new_config):
    """A base comes first, as it stands in its file: the base of a base is not followed."""
    if '_BASE_CONFIG_' in new_config:
        config.update(EasyDict(yaml.safe_load(Path(new_config['_BASE_CONFIG_']).read_text())))
    for key, value in new_config.items():
        if isinstance(value, dict):
            merge_new_config(config.setdefault(key, EasyDict()), value)
        else:
            config[key] = value
    return config


def cfg_from_yaml_file(cfg_file, config):
    return merge_new_config(config, yaml.safe_load(Path(cfg_file).read_text()))


def cfg_from_list(cfg_list, config):
    """``--set``: only what is in the config, and only by a value of the same type."""
    for path, text in zip(cfg_list[::2], cfg_list[1::2]):
        *parents, key = path.split('.')
        holder = config
        for parent in parents:
            assert parent in holder, f'NotFoundKey: {parent}'
            holder = holder[parent]
        assert key in holder, f'NotFoundKey: {key}'
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        assert type(value) is type(holder[key])
        holder[key] = value


cfg = EasyDict(ROOT_DIR=Path(__file__).resolve().parent.parent, LOCAL_RANK=0)
