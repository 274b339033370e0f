"""Three convolutions on the same features."""

from torch import nn


class AnchorHeadSingle(nn.Module):
    def __init__(
        self,
        model_cfg,
        input_channels,
        num_class,
        class_names,
        grid_size,
        point_cloud_range,
        predict_boxes_when_training=True,
        **kwargs,
    ):
        super().__init__()
        self.conv_cls = nn.Conv2d(input_channels, 2 * num_class, 1)
        self.conv_box = nn.Conv2d(input_channels, 14, 1)
        self.conv_dir_cls = (
            nn.Conv2d(input_channels, 4, 1) if model_cfg.get('USE_DIRECTION_CLASSIFIER') else None
        )

    def forward(self, data_dict):
        x = data_dict['spatial_features_2d']
        layers = {'cls': self.conv_cls, 'box': self.conv_box, 'dir': self.conv_dir_cls}
        data_dict['final_box_dicts'] = [{k: layer(x) for k, layer in layers.items() if layer is not None}]
        return data_dict
