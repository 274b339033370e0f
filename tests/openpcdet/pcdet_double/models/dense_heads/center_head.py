"""Heads with branches of their own behind one shared convolution."""

from torch import nn


def _block(inside, outside, bias):
    convolution = nn.Conv2d(inside, outside, 3, padding=1, bias=bias)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())


class SeparateHead(nn.Module):
    def __init__(self, input_channels, sep_head_dict, init_bias=-2.19, use_bias=False, norm_func=None):
        super().__init__()
        self.sep_head_dict = sep_head_dict
        for name, branch in sep_head_dict.items():
            layers = [_block(input_channels, input_channels, use_bias) for _ in range(branch['num_conv'] - 1)]
            last = nn.Conv2d(input_channels, branch['out_channels'], 3, padding=1)
            setattr(self, name, nn.Sequential(*layers, last))

    def forward(self, x):
        return {name: getattr(self, name)(x) for name in self.sep_head_dict}


class CenterHead(nn.Module):
    def __init__(
        self,
        model_cfg,
        input_channels,
        num_class,
        class_names,
        grid_size,
        point_cloud_range,
        voxel_size,
        predict_boxes_when_training=True,
    ):
        super().__init__()
        bias, channels = model_cfg.get('USE_BIAS_BEFORE_NORM', False), model_cfg.SHARED_CONV_CHANNEL
        self.shared_conv = _block(input_channels, channels, bias)
        self.heads_list = nn.ModuleList()
        for names in model_cfg.CLASS_NAMES_EACH_HEAD:
            branches = dict(model_cfg.SEPARATE_HEAD_CFG.HEAD_DICT)
            branches['hm'] = dict(out_channels=len(names), num_conv=model_cfg.NUM_HM_CONV)
            self.heads_list.append(SeparateHead(channels, branches, use_bias=bias))
        self.forward_ret_dict = {}

    def get_loss(self):
        predictions = self.forward_ret_dict['pred_dicts']
        return sum(v.square().mean() for head in predictions for v in head.values())

    def forward(self, data_dict):
        x = self.shared_conv(data_dict['spatial_features_2d'])
        predictions = [head(x) for head in self.heads_list]
        self.forward_ret_dict['pred_dicts'] = predictions
        data_dict['final_box_dicts'] = predictions
        return data_dict
