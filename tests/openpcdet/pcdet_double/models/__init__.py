"""Building a detector and feeding it."""

from collections import namedtuple

import numpy as np
import torch

from .detectors import build_detector


def build_network(model_cfg, num_class, dataset):
    return build_detector(model_cfg=model_cfg, num_class=num_class, dataset=dataset)


def load_data_to_gpu(batch_dict):
    for key, value in batch_dict.items():
        if isinstance(value, np.ndarray) and key != 'frame_id':
            batch_dict[key] = torch.from_numpy(value).float()


def model_fn_decorator():
    result = namedtuple('ModelReturn', ['loss', 'tb_dict', 'disp_dict'])

    def model_func(model, batch_dict):
        load_data_to_gpu(batch_dict)
        ret_dict, tb_dict, disp_dict = model(batch_dict)
        getattr(model, 'module', model).update_global_step()
        return result(ret_dict['loss'].mean(), tb_dict, disp_dict)

    return model_func
